"""Pre-train a BERT on the corpus, from scratch or from a checkpoint.

From: data/pretraining/tokens, and the weights of `model.checkpoint` (random ones if there is none)
To:   models/pretrained (weights in fp16, tokenizer, metadata.json), metrics/pretraining/train (by DVCLive);
      models/pretraining-checkpoint holds what an interrupted run resumes from, and goes when the run is done
Run:  python -m pretrain.train
"""

import hashlib
import json
import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from sentiment import checkpoint, pretraining, pretraining_models, pretraining_params
from sentiment.files import atomic, remove, sha256, write_json
from sentiment.live import recorder, show
from sentiment.logs import run_stage, timed
from sentiment.loop import accelerator_for, seed, state_of
from sentiment.tokens import Tokens, load_tokenizer

TOKENS = Path("data/pretraining/tokens")
MODEL = Path("models/pretrained")
CHECKPOINT = Path("models/pretraining-checkpoint")
LIVE = Path("metrics/pretraining/train")
METRICS = Path("metrics/pretraining/result.json")
log = logging.getLogger("stages.pretrain")


def main() -> None:
    settings, started = pretraining_params.load(), datetime.now(UTC)
    state = state_of(settings.train)
    tokenizer = load_tokenizer(TOKENS / "tokenizer", settings.tokens.max_length)
    seed(settings.train.seed)
    with timed(log, "loading the model"):
        model, module, packed = pretraining_models.build(settings, tokenizer)
    log.info("%s parameters, %s", f"{model.num_parameters():,}", settings.train.model_dump_json(exclude={"sentiment_words"}))
    ready = accelerator_for(settings.train)
    splits = Tokens.load(TOKENS / "train.safetensors"), Tokens.load(TOKENS / "held_out.safetensors")
    feeds = pretraining.feeds(splits, tokenizer.token_to_id("[PAD]") or 0, packed, ready[0].device)
    with recorder(state, LIVE) as live:
        loop = pretraining.Pretraining(
            model, module, feeds, settings.train, ready, CHECKPOINT, fingerprint(settings),
            lambda step, values: show(live, step, values),
        )  # fmt: skip
        result = loop.run()
    if state.is_main_process:
        with loop.not_compiled():
            save(model, module, feeds[1], settings, result, started, ready[0])
        remove(CHECKPOINT)
    state.wait_for_everyone()


def fingerprint(settings: pretraining_params.Params) -> str:
    """What decides a run's result: parameters, checkpoint, data and code."""
    parts: list[Any] = [settings.model_dump(), torch.__version__, PartialState().num_processes]
    parts += checkpoint.files(settings.model)
    parts += [sha256(path) for path in sorted(TOKENS.rglob("*")) if path.is_file()]
    parts += [sha256(path) for path in sorted([Path(__file__), *Path(pretraining.__file__).parent.glob("*.py")])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save(
    model: Any, module: Any, held_out: Any, settings: Any, result: pretraining.Result, started: datetime, accelerator: Accelerator
) -> None:
    """Write the checkpoint in the Hub's layout, whole or not at all, and the run's result."""
    module.eval()
    reader, head = pretraining_models.language_model(module)
    budget = max(settings.train.batch_tokens, settings.tokens.max_length)
    with accelerator.autocast():
        perplexity = pretraining.pseudo_perplexity(
            reader, head, held_out, module.masking.mask_id, settings.train.perplexity_texts, budget
        )
    found = {
        "tokens_seen": result.tokens,
        "seconds": round(result.seconds, 1),
        "share_of_peak": round(result.share_of_peak, 4) if result.share_of_peak else None,
        "pseudo_perplexity": round(perplexity, 3),
    } | {name: value for name, value in result.history[-1].items() if name.startswith("held_out")}
    write_json(METRICS, found)
    with atomic(MODEL) as part:
        pretraining_models.finished(model, module, settings.model.dropout).half().save_pretrained(part)
        for path in sorted((TOKENS / "tokenizer").iterdir()):
            shutil.copyfile(path, part / path.name)
        facts = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "started": started.isoformat(timespec="seconds")}
        facts |= {"device": result.device, "precision": result.precision, "parameters": model.num_parameters()}
        write_json(part / "metadata.json", facts | {"result": found, "history": result.history, "params": settings.model_dump()})
    log.info("%s", found)


if __name__ == "__main__":
    run_stage("pretrain", main)
