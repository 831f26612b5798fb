"""BERT's forward without what this project needs not, over the modules of a BertForSequenceClassification of transformers.

All tokens of a batch stand in one row, whatever it is: the reviews of PackedBert and VarlenBert follow each other, those of
PaddedBert have the same width. The tokens of a review see only each other, and positions begin anew with each, so that the
logits equal those of each review alone to rounding. Of the last layer only what is asked for is computed: the first tokens for
a classifier, the hidden words for a language model.

Two things differ from transformers' own forward in training: attention has no dropout (the kernel for packed reviews has none;
bench/order.py compares F1 with and without), and dropout on a CPU draws its masks four at a time, in a third of
the time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from sentiment.ensemble import Ensemble

NOT_SEEN = -10_000.0  # added to the attention scores of other reviews: far below any score, and exact in bf16
KERNEL_SINCE, KERNEL_WIDEST = (8, 0), 256  # FlashAttention's first compute capability, and its widest head
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Layout(NamedTuple):
    """A batch as Bert reads it; see Bert.encode."""

    input_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens], of each token within its review
    first: torch.Tensor  # int64 [reviews], where each review begins
    attend: Attend
    attend_first: Attend


class Bert(nn.Module):
    """The modules of a BertForSequenceClassification, and what they make of tokens in a row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bert, self.heads = model.bert, model.config.num_attention_heads
        self.classifier: Any = getattr(model, "classifier", None)  # a language model has none
        self.dropout = getattr(model, "dropout", nn.Dropout(0.0))

    def compile(self, *_: Any, **__: Any) -> None:
        """Compile what a layer does after its attention, once for all layers: what is many small kernels else.

        The products before and the attention itself are kernels of their own either way.
        """
        self.feed_forward = torch.compile(self.feed_forward, dynamic=True)  # type: ignore[method-assign]

    def logits(self, layout: Layout) -> torch.Tensor:
        """The logits of the reviews: [reviews, classes]."""
        hidden = self.encode(layout, layout.first, layout.attend_first)
        return self.classifier(self.drop(torch.tanh(self.bert.pooler.dense(hidden)), self.dropout))

    def encode(self, layout: Layout, wanted: torch.Tensor | None = None, attend_wanted: Attend | None = None) -> torch.Tensor:
        """What the last layer makes of the tokens at `wanted`, or of all: [tokens, hidden_size].

        A Layout's `attend` is the attention within each review: query, key and value [tokens, heads, head_size] in, the same out.
        `attend_wanted` is that for the queries of `wanted` alone, [wanted, heads, head_size] in and out; without it the last
        layer's attention, but no more of it, is computed for all tokens.
        """
        tables = self.bert.embeddings
        hidden = (
            tables.word_embeddings(layout.input_ids)
            + tables.position_embeddings(layout.positions)
            + tables.token_type_embeddings.weight[0]
        )
        hidden = self.drop(tables.LayerNorm(hidden), tables.dropout)
        *layers, last = self.bert.encoder.layer
        for layer in layers:
            hidden = self.feed_forward(layer, hidden, self.attention(layer.attention.self, hidden, hidden, layout.attend))
        if wanted is None or attend_wanted is None:
            attended, shown = self.attention(last.attention.self, hidden, hidden, layout.attend), hidden
            if wanted is not None:
                attended, shown = attended[wanted], hidden[wanted]
        else:
            shown = hidden[wanted]
            attended = self.attention(last.attention.self, shown, hidden, attend_wanted)
        return self.feed_forward(last, shown, attended)

    def feed_forward(self, layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What a layer makes of tokens and of their self-attention: [tokens, hidden_size]."""
        attention, output = layer.attention.output, layer.output
        hidden = attention.LayerNorm(self.drop(attention.dense(attended), attention.dropout) + hidden)
        inner = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(hidden))
        return output.LayerNorm(self.drop(output.dense(inner), output.dropout) + hidden)

    def drop(self, values: torch.Tensor, dropout: nn.Dropout) -> torch.Tensor:
        """What a dropout does in training; the same values otherwise."""
        if not self.training or dropout.p == 0.0:
            return values
        if values.device.type == "cpu":
            return cast("torch.Tensor", CpuDropout.apply(values, dropout.p))  # type: ignore[no-untyped-call]
        return functional.dropout(values, dropout.p)

    def attention(self, layer: Any, asking: torch.Tensor, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Self-attention of one layer to all tokens, for those that ask, before its output projection: [asking, hidden_size]."""
        device, same = hidden.device.type, asking is hidden
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))  # once, and not for each of the three
        query = layer.query(hidden if same else asking).view(asking.shape[0], self.heads, -1)
        key, value = (part(hidden).view(hidden.shape[0], self.heads, -1) for part in (layer.key, layer.value))
        return attend(query, key, value).reshape(asking.shape[0], -1)


class PackedBert(Bert):
    """Reads packed rows: the tensors of a `Row` in, logits [width // 4, classes] out."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, reviews: torch.Tensor, first: torch.Tensor
    ) -> torch.Tensor:
        """The logits of the reviews that begin at `first`."""
        return self.logits(Layout(input_ids, positions, first, *masked(reviews, first)))


class VarlenBert(Bert):
    """Reads packed batches of any number of tokens, by PyTorch's variable-length attention on CUDA (in bf16 or fp16).

    Elsewhere a mask does the same, at a cost that grows with the square of the batch.
    """

    def forward(self, **inputs: Any) -> torch.Tensor:
        """The logits of the reviews that begin at `first`; for the tensors see Feed.batch."""
        return self.logits(self.layout(**inputs))

    def layout(
        self, input_ids: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor, first: torch.Tensor, longest: int
    ) -> Layout:
        """The batch as Bert reads it."""
        if input_ids.device.type == "cuda":
            return Layout(input_ids, positions, first, varlen(bounds, longest), varlen_first(bounds, longest, len(input_ids)))
        place = torch.arange(len(input_ids), device=bounds.device)
        return Layout(input_ids, positions, first, *masked(torch.searchsorted(bounds, place, right=True), first))


class PaddedBert(Bert):
    """Reads padded batches: input_ids, attention_mask int64 [reviews, width] (no mask: all 1); logits [reviews, classes] out."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of the reviews."""
        return self.logits(self.layout(input_ids, attention_mask))

    def layout(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Layout:
        """The batch as Bert reads it."""
        reviews, width = input_ids.shape
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        attention = small_attention if input_ids.device.type == "cpu" else functional.scaled_dot_product_attention
        place = torch.arange(reviews * width, device=input_ids.device)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            parts = [each.view(reviews, -1, *each.shape[1:]).transpose(1, 2) for each in (query, key, value)]
            return attention(parts[0], parts[1], parts[2], mask).transpose(1, 2).reshape(query.shape)

        return Layout(input_ids.flatten(), place % width, place[::width], attend, attend)


def small_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """scaled_dot_product_attention by plain products: for reviews, which are short, five times faster than torch's on a CPU."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, NOT_SEEN)
    return scores.softmax(-1) @ value


class CpuDropout(torch.autograd.Function):
    """Dropout whose mask is 16 random bits a value, four of them from each number that torch's generator draws.

    A value falls out with a probability of `share` rounded to 1 / 65536.
    """

    @staticmethod
    def forward(context: Any, values: torch.Tensor, share: float) -> torch.Tensor:
        """The values, those that fall out as 0, the others divided by 1 - share."""
        numbers = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = numbers.view(torch.int16)[: values.numel()].view(values.shape)
        context.kept, context.scale = bits >= round(share * 65536) - 32768, 1 / (1 - share)
        return torch.where(context.kept, values, 0.0).mul_(context.scale)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient, 0 where a value fell out."""
        return torch.where(context.kept, gradient, 0.0).mul_(context.scale), None


def masked(reviews: torch.Tensor, first: torch.Tensor) -> tuple[Attend, Attend]:
    """Attention for all tokens and for those at `first`, a mask added to the scores; `reviews` [tokens] says what each is of."""

    def of(asking: torch.Tensor) -> Attend:
        mask = torch.where(asking.unsqueeze(1) == reviews.unsqueeze(0), 0.0, NOT_SEEN)[None, None]

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            parts = [each.transpose(0, 1).unsqueeze(0) for each in (query, key, value)]
            attended = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], mask.to(query.dtype))
            return attended.squeeze(0).transpose(0, 1)

        return attend

    return of(reviews), of(reviews[first])


def varlen(bounds: torch.Tensor, longest: int) -> Attend:
    """FlashAttention within `bounds` int32 [reviews + 1], none of them further apart than `longest`."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended = varlen_attn(query, key, value, bounds, bounds, longest, longest)
        assert isinstance(attended, torch.Tensor)  # noqa: S101  it is a pair only if asked for
        return attended

    return attend


def varlen_first(bounds: torch.Tensor, longest: int, tokens: int) -> Attend:
    """FlashAttention of the first token of each review but the last one, which is padding, for queries [reviews - 1, …].

    Nothing asks for the padding, so that the kernel leaves its gradients as it finds the memory: they are set to 0 here.
    """
    begins = torch.arange(len(bounds) - 1, dtype=bounds.dtype, device=bounds.device)
    asked_for = (torch.arange(tokens, device=bounds.device) < bounds[-2])[:, None, None]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = torch.where(asked_for, key, 0.0), torch.where(asked_for, value, 0.0)
        attended = varlen_attn(query, key, value, begins, bounds[:-1], 1, longest)
        assert isinstance(attended, torch.Tensor)  # noqa: S101  it is a pair only if asked for
        return attended

    return attend


def can_pack(model: Any) -> bool:
    """Whether a model is a BERT classifier as this module reads it, or an ensemble of these."""
    if isinstance(model, Ensemble):
        return all(map(can_pack, model.members))
    return (
        model.config.model_type == "bert" and hasattr(model, "bert") and isinstance(getattr(model, "classifier", None), nn.Linear)
    )


def kernel_takes(model: Any, device: torch.device) -> bool:
    """Whether a CUDA device has the attention kernel for packed reviews, from Ampere on, and the kernel the model's head size."""
    if isinstance(model, Ensemble):
        return all(kernel_takes(member, device) for member in model.members)
    size = model.config.hidden_size // model.config.num_attention_heads
    return torch.cuda.get_device_capability(device) >= KERNEL_SINCE and size % 8 == 0 and size <= KERNEL_WIDEST


def packs(model: Any, device: torch.device, precision: str) -> bool:
    """Whether a model is best computed packed: on CUDA, where the attention kernel takes it in this precision."""
    return device.type == "cuda" and precision in ("bf16", "fp16") and can_pack(model) and kernel_takes(model, device)


def reader(model: Any, packed: bool) -> nn.Module:
    """What reads the batches of a Feed: this project's forward for a BERT classifier, else the model itself."""
    if isinstance(model, Ensemble):
        return model.of(reader(member, packed) for member in model.members)
    return VarlenBert(model) if packed else PaddedBert(model) if can_pack(model) else model


def row_reader(model: Any) -> nn.Module:
    """What reads packed rows (sentiment/packing.py)."""
    return model.of(map(PackedBert, model.members)) if isinstance(model, Ensemble) else PackedBert(model)
