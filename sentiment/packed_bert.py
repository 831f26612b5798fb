"""BERT reading reviews that are packed into rows (see sentiment/packing.py).

The tokens of a row see only those of their own review (a block-diagonal mask), and positions begin anew with each review, so
that the logits equal those of each review alone to rounding.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

NOT_SEEN = -10_000.0  # added to the attention scores of other reviews: far below any score, and exact in bf16


class PackedBert(nn.Module):
    """A BertForSequenceClassification that reads packed rows: the tensors of a `Row` in, logits [width // 4, classes] out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bert, self.classifier, self.heads = model.bert, model.classifier, model.config.num_attention_heads

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, reviews: torch.Tensor, first: torch.Tensor
    ) -> torch.Tensor:
        """The logits of the reviews that begin at `first`."""
        tables = self.bert.embeddings
        hidden = (
            tables.word_embeddings(input_ids) + tables.position_embeddings(positions) + tables.token_type_embeddings.weight[0]
        )
        hidden = tables.LayerNorm(hidden)
        mask = torch.where(reviews.unsqueeze(0) == reviews.unsqueeze(1), 0.0, NOT_SEEN)[None, None].to(hidden.dtype)
        for layer in self.bert.encoder.layer:
            attended = self.attention(layer.attention.self, hidden, mask)
            hidden = layer.attention.output.LayerNorm(layer.attention.output.dense(attended) + hidden)
            inner = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(hidden))
            hidden = layer.output.LayerNorm(layer.output.dense(inner) + hidden)
        return self.classifier(torch.tanh(self.bert.pooler.dense(hidden[first])))

    def attention(self, layer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Self-attention of one layer, before its output projection: [width, hidden_size]."""
        width = hidden.shape[0]
        query, key, value = (
            part(hidden).view(1, width, self.heads, -1).transpose(1, 2) for part in (layer.query, layer.key, layer.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).reshape(width, -1)


def can_pack(model: Any) -> bool:
    """Whether a model is a BERT classifier as PackedBert reads it."""
    return (
        model.config.model_type == "bert" and hasattr(model, "bert") and isinstance(getattr(model, "classifier", None), nn.Linear)
    )
