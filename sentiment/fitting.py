"""From a trained model to one that answers: a model folder, with temperature, bias and threshold fitted on validation."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from sentiment import calibration, metrics
from sentiment.classifier import Classifier, Inference
from sentiment.params import Params
from sentiment.tokens import Tokens

log = logging.getLogger(__name__)


def save(model: Any, tokenizer: Path, validation: Tokens, settings: Params, folder: Path) -> tuple[Classifier, dict[str, float]]:
    """Write weights, tokenizer and inference.json to `folder`; returns the classifier that it is, and its validation scores."""
    model.save_pretrained(folder)
    for path in sorted(tokenizer.iterdir()):
        shutil.copyfile(path, folder / path.name)
    fixed = (settings.tokenize.max_length, settings.prepare.case, settings.prepare.text)
    Inference(*fixed, temperature=1.0, threshold=None, emoji=settings.tokenize.emoji).save(folder)
    classifier = Classifier.load(folder, settings.train.device)
    scores, inference = fit(classifier, validation, settings)
    inference.save(folder)
    return replace(classifier, inference=inference), scores


def fit(classifier: Classifier, validation: Tokens, settings: Params) -> tuple[dict[str, float], Inference]:
    """Temperature, bias and threshold for the model, and its scores on validation with them."""
    labels = validation.labels.astype(int)
    raw = classifier.token_logits(validation, settings.evaluate.batch_tokens)
    temperature, bias = calibration.fit_bias(raw, labels) or (calibration.fit_temperature(raw, labels), None)
    values = calibration.probabilities(raw, temperature, bias)
    threshold = calibration.fit_threshold(values, labels)
    told = ", ".join(f"{value:+.3f}" for value in bias) if bias else "none"
    log.info("fitted on validation: temperature %.3f, bias %s, threshold %s", temperature, told, threshold)
    scores = metrics.score(values, calibration.decide(values, threshold), labels, classifier.labels)
    return scores, replace(classifier.inference, temperature=temperature, threshold=threshold, bias=bias)
