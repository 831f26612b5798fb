"""The models that pre-training begins with and leaves, in the layout of transformers."""

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from sentiment.bert import PaddedBert, VarlenBert
from sentiment.checkpoint import arguments, check_sizes, failure, no_progress_bars, small_config
from sentiment.classifier import pick_device
from sentiment.devices import native_precision
from sentiment.errors import CheckpointError, TrainingError
from sentiment.pretraining import MaskedModel, ReplacedTokens, Vocabulary
from sentiment.pretraining_params import Params


def build(settings: Params, tokenizer: Tokenizer) -> tuple[Any, MaskedModel | ReplacedTokens, bool]:
    """The model to be pre-trained, what computes its objective, and whether its batches are packed.

    Raises CheckpointError where the checkpoint is no BERT or has another tokenizer, TrainingError where packing is not had.
    """
    no_progress_bars()
    device = pick_device(settings.train.device).type
    precision = settings.train.precision if settings.train.precision != "auto" else native_precision(device)
    packs = device == "cuda" and precision in ("bf16", "fp16")
    if settings.train.batching == "packed" and device == "cuda" and not packs:
        raise TrainingError("train.batching packed needs train.precision bf16 or fp16 on CUDA; set one of the two to auto")
    packed = settings.train.batching == "packed" or (settings.train.batching == "auto" and packs)
    masked = masked_bert(settings, tokenizer)
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


def masked_bert(settings: Params, tokenizer: Tokenizer, layers: int | None = None) -> Any:
    """A BertForMaskedLM: the checkpoint, or random weights; of its first `layers` layers alone, if they are given."""
    from transformers import AutoModelForMaskedLM, BertForMaskedLM

    depth = {"num_hidden_layers": layers} if layers else {}
    if settings.model.checkpoint is None:
        config = small_config(settings.model, tokenizer, settings.tokens.max_length)
        config.update(depth)
        return BertForMaskedLM(config)
    try:
        model = AutoModelForMaskedLM.from_pretrained(
            settings.model.checkpoint, dtype=torch.float32, weights_only=True, **depth, **arguments(settings.model)
        )
    except Exception as error:
        raise failure(settings.model, error) from error
    if model.config.model_type != "bert":
        raise CheckpointError(
            f"{settings.model.checkpoint} is a {model.config.model_type}; pre-training goes on from a BERT only"
        )
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
