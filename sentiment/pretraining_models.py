"""The models that pre-training begins with and leaves, in the layout of transformers."""

import logging
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from sentiment.bert import PaddedBert, VarlenBert, kernel_takes
from sentiment.checkpoint import (
    arguments,
    check_sizes,
    check_weights,
    failure,
    no_progress_bars,
    small_config,
    warnings_left_out,
)
from sentiment.classifier import pick_device
from sentiment.devices import native_precision
from sentiment.errors import CheckpointError, TrainingError
from sentiment.pretraining import MaskedModel, ReplacedTokens, Vocabulary
from sentiment.pretraining_params import Params

log = logging.getLogger(__name__)


def build(settings: Params, tokenizer: Tokenizer) -> tuple[Any, MaskedModel | ReplacedTokens, bool]:
    """The model to be pre-trained, what computes its objective, and whether its batches are packed.

    Raises CheckpointError where the checkpoint is no BERT or has another tokenizer, TrainingError where packing is not had.
    """
    no_progress_bars()
    masked = masked_bert(settings, tokenizer)
    packed = is_packed(settings, masked)
    words = settings.train.sentiment_words if settings.train.sentiment_weight else []
    vocabulary = Vocabulary.of(tokenizer, masked.config.vocab_size, words)
    if settings.train.objective == "mlm":
        module: MaskedModel | ReplacedTokens = MaskedModel(masked, vocabulary, packed, settings.train.sentiment_weight)
        model = masked
    else:
        model = masked.bert
        generator = masked_bert(settings, tokenizer, settings.train.generator_layers)
        module = ReplacedTokens(model, generator, vocabulary, packed)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = settings.train.dropout
    return model, module, packed


def is_packed(settings: Params, model: Any) -> bool:
    """Whether batches are packed; raises TrainingError where they are to be and cannot."""
    device, batching = pick_device(settings.train.device), settings.train.batching
    precision = settings.train.precision if settings.train.precision != "auto" else native_precision(device.type)
    packs = device.type == "cuda" and precision in ("bf16", "fp16") and kernel_takes(model, device)
    if batching == "packed" and device.type == "cuda" and not packs:
        raise TrainingError(
            "train.batching packed needs train.precision bf16 or fp16 on CUDA, and a GPU with an attention kernel for the model; "
            "set it to auto"
        )
    return batching == "packed" or (batching == "auto" and packs)


def masked_bert(settings: Params, tokenizer: Tokenizer, layers: int | None = None) -> Any:
    """A BertForMaskedLM: the checkpoint, or random weights; of its first `layers` layers alone, if they are given."""
    from transformers import AutoModelForMaskedLM, BertForMaskedLM

    depth = {"num_hidden_layers": layers} if layers else {}
    if settings.model.checkpoint is None:
        config = small_config(settings.model, tokenizer, settings.tokens.max_length)
        config.update(depth)
        return BertForMaskedLM(config)
    try:
        with warnings_left_out():
            model, info = AutoModelForMaskedLM.from_pretrained(
                settings.model.checkpoint, dtype=torch.float32, weights_only=True, output_loading_info=True, **depth,
                **arguments(settings.model),
            )  # fmt: skip
    except Exception as error:
        raise failure(settings.model, error) from error
    if model.config.model_type != "bert":
        raise CheckpointError(
            f"{settings.model.checkpoint} is a {model.config.model_type}; pre-training goes on from a BERT only"
        )
    check_weights(settings.model, model, info)
    if head := [name for name in info["missing_keys"] if name.startswith("cls.")]:
        log.warning("%s has no %s: what names hidden words begins at random", settings.model.checkpoint, ", ".join(sorted(head)))
    check_sizes(settings.model, model.config, tokenizer, "tokens.max_length", settings.tokens.max_length)
    return model


def language_model(module: MaskedModel | ReplacedTokens) -> tuple[VarlenBert | PaddedBert, nn.Module]:
    """What encodes, and what names tokens, of the objective's masked language model."""
    if isinstance(module, MaskedModel):
        return module.reader, module.head
    return module.generator, module.generator_head


def finished(model: Any, module: MaskedModel | ReplacedTokens, dropout: float) -> Any:
    """The model as it is saved: its token embeddings in one table, its configuration with the dropout of fine-tuning."""
    if isinstance(module, ReplacedTokens):
        model.embeddings.word_embeddings = model.embeddings.word_embeddings.merged()
        model.pooler = None
    model.config.update({"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout})
    return model
