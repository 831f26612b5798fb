"""Learning a language from its texts: masked-language modelling, or telling replaced tokens from original ones.

`mlm` hides whole words and has the model name them (Devlin et al. 2019; whole words: Cui et al. 2021). `rtd` has a smaller
masked language model, the generator, fill the hidden places, and the model say of every token whether it stood there
(ELECTRA, Clark et al. 2020); the two share the token embeddings as in DeBERTaV3 (He et al. 2021): what the generator learns
reaches the model, what the model learns stays with the model.

With a list of words of praise and complaint `mlm` hides these before others, and has the model name those of a text from its
[CLS], too, in the manner of sentiment masking and sentiment word prediction of SKEP (Tian et al. 2020): what a classifier
reads then holds what the text is for.
"""

import logging
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

from sentiment import pretraining_params as params
from sentiment.bert import Layout, PaddedBert, VarlenBert
from sentiment.devices import describe, step_flops
from sentiment.errors import CheckpointError
from sentiment.feed import Feed, Inputs, Shape
from sentiment.loop import LogMetrics, Loop
from sentiment.tokens import Tokens

DETECTION_WEIGHT = 50.0  # of the loss of telling replaced tokens, beside the generator's (Clark et al. 2020, table 6)
SHOWN_AS_IS, SHOWN_AS_ANOTHER = 0.1, 0.1  # shares of the hidden tokens that mlm does not show as [MASK] (Devlin et al. 2019)
SENTIMENT_CHANCE = 0.2  # a word of sentiment is hidden before another unless that draws a number of less than a fifth of its own
NEARLY = 0.02
VALIDATION_TOKENS = 8192
VALIDATION_SEED = 0
log = logging.getLogger(__name__)


class Vocabulary(NamedTuple):
    """What masking has to know of a tokenizer: [MASK]'s id, and which tokens are special, continuations, words of sentiment.

    The last three are bool [vocabulary].
    """

    mask_id: int
    special: torch.Tensor
    continues: torch.Tensor
    sentiment: torch.Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, words: Iterable[str] = ()) -> "Vocabulary":
        """The facts of a WordPiece tokenizer, for a model with `size` embeddings.

        `words` are those of sentiment; they count as they stand, capitalized and in capitals, where they are one token.
        Raises CheckpointError if the tokenizer has no [MASK], or none of the words as a token.
        """
        special, continues = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        for token, number in tokenizer.get_vocab().items():
            continues[number] = token.startswith("##")
        for number, added in tokenizer.get_added_tokens_decoder().items():
            special[number] = added.special
        if (mask_id := tokenizer.token_to_id("[MASK]")) is None:
            raise CheckpointError("the tokenizer has no token [MASK], which pre-training hides words by; take another checkpoint")
        return cls(mask_id, special, continues, one_token(tokenizer, size, list(words)))


def one_token(tokenizer: Tokenizer, size: int, words: list[str]) -> torch.Tensor:
    """Which tokens are one of the words: bool [size]; raises CheckpointError if there are words and none is a token."""
    found = torch.zeros(size, dtype=torch.bool)
    forms = {form for word in words for form in (word, word.capitalize(), word.upper())}
    numbers = [number for form in sorted(forms) if (number := tokenizer.token_to_id(form)) is not None]
    if words and not numbers:
        raise CheckpointError(
            "train.sentiment_words: the tokenizer has none of them as a token; name others, or set train.sentiment_weight to 0"
        )
    found[numbers] = True
    return found


class Masking(nn.Module):
    """Chooses the words to hide, and hides them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.mask_id = vocabulary.mask_id
        self.special: torch.Tensor
        self.continues: torch.Tensor
        self.register_buffer("special", vocabulary.special, persistent=False)
        self.register_buffer("continues", vocabulary.continues, persistent=False)
        self.sentiment: torch.Tensor
        self.register_buffer("sentiment", vocabulary.sentiment, persistent=False)

    def places(self, input_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Which `count` tokens are to be named: int64 [count], whole words but perhaps the last, none of them special.

        Words of sentiment come before others: the number that a word draws is multiplied by SENTIMENT_CHANCE.
        The number is given, and not drawn, so that shapes are known before the device has computed anything.
        """
        word = (~self.continues[input_ids]).cumsum(0) - 1  # a batch begins with [CLS], which begins a word
        chance = torch.rand(len(input_ids), device=input_ids.device)[word]
        chance = torch.where(self.of_sentiment(input_ids), SENTIMENT_CHANCE * chance, chance)
        return chance.masked_fill_(self.special[input_ids], 2.0).topk(count, largest=False).indices

    def of_sentiment(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are whole words of sentiment: bool [tokens]."""
        goes_on = functional.pad(self.continues[input_ids[1:]], (0, 1))
        return self.sentiment[input_ids] & ~goes_on

    def hide(self, input_ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The ids with [MASK] at the places."""
        return input_ids.index_fill(0, places, self.mask_id)

    def hide_most(self, input_ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The ids with [MASK] at most of the places, the token itself or any other one at the rest."""
        chance = torch.rand(len(places), device=input_ids.device)
        shown = torch.full_like(places, self.mask_id)
        shown = torch.where(chance < SHOWN_AS_ANOTHER, torch.randint_like(places, len(self.special)), shown)
        return input_ids.index_copy(0, places, torch.where(chance > 1 - SHOWN_AS_IS, input_ids[places], shown))


class MaskedModel(nn.Module):
    """Masked-language modelling with a BertForMaskedLM of transformers.

    `sentiment_weight` is that of the loss of naming hidden words of sentiment from [CLS]; without such words in the vocabulary
    there is no such loss.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, packed: bool, sentiment_weight: float = 0.0) -> None:
        super().__init__()
        self.reader, self.whole = read(model, packed), [model]  # in a list, so that its weights count once
        self.head: Any = model.cls
        self.masking = Masking(vocabulary)
        self.of_sentiment = bool(vocabulary.sentiment.any())
        self.names = ("loss", "sentiment_loss") if self.of_sentiment else ("loss",)
        self.weights = (1.0, sentiment_weight) if self.of_sentiment else (1.0,)

    def forward(self, count: int, **inputs: Any) -> torch.Tensor:
        """The mean cross-entropy of `count` hidden tokens, and of the words of sentiment among them named from [CLS]: [1] or [2].

        In nats; both by the same head.
        """
        layout = self.reader.layout(**inputs)
        input_ids = layout.input_ids
        places = self.masking.places(input_ids, count)
        shown = layout._replace(input_ids=self.masking.hide_most(input_ids, places))
        asked = torch.cat([places, layout.first]) if self.of_sentiment else places
        logits = self.head(self.reader.encode(shown, asked)).float()
        losses = [functional.cross_entropy(logits[:count], input_ids[places])]
        if self.of_sentiment:
            counted = self.masking.of_sentiment(input_ids)[places]
            losses.append(self.from_first(logits[count:], layout, places, counted))
        return torch.stack(losses)

    def flops(self, lengths: np.ndarray, hidden: float) -> float:
        """Operations to learn from texts of these lengths, `hidden` of whose tokens are; see step_flops."""
        return naming_flops(self.whole[0], lengths, hidden + len(lengths) * self.of_sentiment)

    def compile(self, *_: Any, **__: Any) -> None:
        """Compile what a layer of the model does after its attention."""
        self.reader.compile()

    def from_first(self, logits: torch.Tensor, layout: Layout, places: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the tokens at `places` that are counted, by the logits [texts, vocabulary] of their text."""
        begins = torch.zeros_like(layout.input_ids).index_fill_(0, layout.first, 1)
        text = (begins.cumsum(0) - 1)[places]
        named = logits[text, layout.input_ids[places]] - logits.logsumexp(-1)[text]
        return -(named * counted).sum() / counted.sum().clamp(min=1)


class ReplacedTokens(nn.Module):
    """Telling replaced tokens, with a BertModel of transformers and a generator, a BertForMaskedLM of the same width."""

    names = ("generator_loss", "loss")
    weights = (1.0, DETECTION_WEIGHT)

    def __init__(self, model: Any, generator: Any, vocabulary: Vocabulary, packed: bool) -> None:
        super().__init__()
        model.embeddings.word_embeddings = SharedEmbeddings(generator.bert.embeddings.word_embeddings)
        self.reader = read(Holder(model), packed)
        self.generator = read(generator, packed)
        self.generator_head: Any = generator.cls
        self.whole = [model, generator]
        width = model.config.hidden_size
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.masking = Masking(vocabulary)

    def forward(self, count: int, **inputs: Any) -> torch.Tensor:
        """The generator's mean cross-entropy over `count` hidden tokens, and the model's over all but special ones: [2]."""
        layout = self.reader.layout(**inputs)
        input_ids = layout.input_ids
        places = self.masking.places(input_ids, count)
        filled = self.generator.encode(layout._replace(input_ids=self.masking.hide(input_ids, places)), places)
        logits = self.generator_head(filled).float()
        shown = input_ids.index_copy(0, places, draw(logits.detach()))
        found = self.head(self.reader.encode(layout._replace(input_ids=shown))).squeeze(1).float()
        counted = ~self.masking.special[input_ids]
        detection = functional.binary_cross_entropy_with_logits(found, (shown != input_ids).float(), reduction="none")
        return torch.stack([functional.cross_entropy(logits, input_ids[places]), (detection * counted).sum() / counted.sum()])

    def flops(self, lengths: np.ndarray, hidden: float) -> float:
        """Operations to learn from texts of these lengths, `hidden` of whose tokens the generator fills; see step_flops."""
        model, generator = self.whole
        head = sum(weight.numel() for weight in self.head.parameters() if weight.ndim > 1)
        return naming_flops(generator, lengths, hidden) + step_flops(model.encoder, lengths) + 6.0 * head * float(lengths.sum())

    def compile(self, *_: Any, **__: Any) -> None:
        """Compile what a layer of the model and of its generator does after its attention."""
        self.reader.compile()
        self.generator.compile()


def naming_flops(model: Any, lengths: np.ndarray, named: float) -> float:
    """Operations to train a BertForMaskedLM to name `named` tokens of texts of these lengths, the last layer asked by all."""
    config = model.config
    head = 6.0 * config.vocab_size * config.hidden_size * named
    return step_flops(model, lengths, named, float(lengths.sum())) + head


class Holder(nn.Module):
    """A BertModel where its readers look for one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bert, self.config = model, model.config


class SharedEmbeddings(nn.Module):
    """The generator's token embeddings, which are not changed from here, plus a difference that is learnt."""

    def __init__(self, shared: nn.Embedding) -> None:
        super().__init__()
        self.shared = [shared]  # in a list, so that its weights count as the generator's alone
        rows, width = shared.weight.shape
        self.difference = nn.Embedding(rows, width, _weight=torch.zeros_like(shared.weight))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings: [tokens, hidden_size]."""
        return functional.embedding(input_ids, self.shared[0].weight.detach()) + self.difference(input_ids)

    def merged(self) -> nn.Embedding:
        """Both as one table."""
        weight = self.shared[0].weight.detach() + self.difference.weight.detach()
        rows, width = weight.shape
        return nn.Embedding(rows, width, _weight=weight)


def read(model: Any, packed: bool) -> VarlenBert | PaddedBert:
    """What lays out and encodes the batches of a Feed."""
    return VarlenBert(model) if packed else PaddedBert(model)


def draw(logits: torch.Tensor) -> torch.Tensor:
    """A token for each row of logits [rows, vocabulary], by their softmax: one number is drawn a row, and looked up."""
    steps = logits.softmax(-1).cumsum(-1)
    chosen = torch.rand(len(logits), 1, device=logits.device) * steps[:, -1:]
    return torch.searchsorted(steps, chosen).squeeze(1).clamp_(max=logits.shape[1] - 1)


class Result(NamedTuple):
    """How the epochs went, the tokens that were seen, what it ran on, and the share of its peak, where that is known.

    `seconds` and the share are of the whole training, with the losses on held-out texts after every epoch.
    """

    history: list[dict[str, float]]
    tokens: int
    device: str
    precision: str
    seconds: float
    share_of_peak: float | None


class Pretraining(Loop):
    """One run of pre-training. `run` is what its users call."""

    module: MaskedModel | ReplacedTokens
    settings: params.Train

    def __init__(
        self, base: Any, module: MaskedModel | ReplacedTokens, feeds: tuple[Feed, Feed], settings: params.Train,
        ready: Any, folder: Path, fingerprint: str, log_metrics: LogMetrics,
    ) -> None:  # fmt: skip
        train, self.held_out = feeds
        super().__init__(base, module, train, settings, ready, folder, fingerprint, log_metrics)
        self.loss_weights = torch.tensor(module.weights, device=self.device)

    def run(self) -> Result:
        """Train to the end."""
        self.train()
        done = self.progress
        flops = self.settings.epochs * self.flops(self.feed.lengths) / done.seconds / self.accelerator.num_processes
        share = flops / self.peak if self.peak else None
        return Result(done.history, done.tokens, describe(self.device), self.precision, done.seconds, share)

    def weight(self, rows: np.ndarray) -> float:
        """Tokens of some texts, [CLS] and [SEP] not counted."""
        return maskable(self.feed, rows)

    def flops(self, lengths: np.ndarray) -> float:
        """Operations that learning from texts of these lengths takes, with what names their hidden tokens."""
        return self.module.flops(lengths, self.settings.mask * float((lengths - 2).sum()))

    def inputs(self, rows: np.ndarray, shape: Shape | None = None) -> Inputs:
        """Some texts, how many of their tokens are hidden, and their weight.

        In a shape the number of hidden tokens is the same for all (see `fits`).
        """
        weight = self.weight(rows)
        hidden = self.hidden_in_shape if shape else hidden_count(self.settings.mask, weight)
        return self.feed.batch(rows, shape).inputs | {"count": hidden, "weight": torch.full((), weight, device=self.device)}

    @cached_property
    def hidden_in_shape(self) -> int:
        """How many tokens are hidden in a batch that is replayed: as many as in most."""
        return int(np.median([hidden_count(self.settings.mask, self.weight(rows)) for rows in self.first_plan]))

    def fits(self, rows: np.ndarray, shape: Shape) -> bool:
        """Whether texts can be computed in a shape: their hidden tokens are a fiftieth more or less than in most batches."""
        hidden = hidden_count(self.settings.mask, self.weight(rows))
        return super().fits(rows, shape) and abs(hidden - self.hidden_in_shape) <= NEARLY * self.hidden_in_shape

    def loss_of(self, inputs: Inputs) -> torch.Tensor:
        """The weighted sum of the objective's losses, times the weight of the texts."""
        texts = {name: value for name, value in inputs.items() if name != "weight"}
        return (self.model(**texts) * self.loss_weights).sum() * inputs["weight"]

    def losses(self, module: Any, feed: Feed, rows: np.ndarray) -> torch.Tensor:
        """Each loss of the objective on a batch: [losses]."""
        return module(count=hidden_count(self.settings.mask, maskable(feed, rows)), **feed.batch(rows).inputs)

    def validate(self, steps: int) -> None:
        """The losses on held-out texts, the same words hidden each time."""
        progress = self.progress
        self.model.eval()
        plan = self.held_out.in_order(max(VALIDATION_TOKENS, int(self.held_out.lengths.max())))
        weights = torch.tensor([maskable(self.held_out, rows) for rows in plan], device=self.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(VALIDATION_SEED)
            losses = torch.stack([self.losses(self.model, self.held_out, rows) for rows in plan])
        found = (losses * weights[:, None]).sum(0) / weights.sum()
        values = dict(zip(self.module.names, found.tolist(), strict=True))
        row: dict[str, float] = {"epoch": progress.epoch + 1, "step": progress.step, "tokens": progress.tokens}
        row |= {"train_loss": progress.loss_sum / steps} | {f"held_out_{name}": value for name, value in values.items()}
        progress.history.append(row)
        self.point({f"held_out/{name}": value for name, value in values.items()})
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        log.info("epoch %d/%d  %d tokens seen  held out: %s", row["epoch"], self.settings.epochs, progress.tokens, shown)


def hidden_count(share: float, tokens: float) -> int:
    """How many of so many tokens are hidden."""
    return max(1, round(share * tokens))


def maskable(feed: Feed, rows: np.ndarray) -> float:
    """Tokens of some texts of a feed, [CLS] and [SEP] not counted."""
    return float(max(1, int((feed.lengths[rows] - 2).sum())))


def feeds(tokens: tuple[Tokens, Tokens], pad_id: int, packed: bool, device: torch.device) -> tuple[Feed, Feed]:
    """The feeds of the texts to train on and of those held out."""
    return Feed(tokens[0], device, pad_id, packed), Feed(tokens[1], device, pad_id, packed)


@torch.no_grad()
def pseudo_perplexity(
    reader: VarlenBert | PaddedBert, head: nn.Module, feed: Feed, mask_id: int, texts: int, budget: int
) -> float:
    """Exp of the mean cross-entropy of every token of `texts` texts, each hidden alone (Salazar et al. 2020).

    The texts are drawn from all of the feed's, the same for the same feed, since those of one file stand together.
    """
    reader.eval(), head.eval()
    total, number = 0.0, 0
    for row in np.random.default_rng(VALIDATION_SEED).permutation(len(feed.lengths))[:texts].tolist():
        length = int(feed.lengths[row])
        hidden_places = np.arange(1, length - 1)
        for chunk in np.array_split(hidden_places, max(1, math.ceil(length * len(hidden_places) / budget))):
            if not len(chunk):
                continue
            total += float(hidden_one_by_one(reader, head, feed, row, chunk, mask_id))
            number += len(chunk)
    return math.exp(total / max(1, number))


def hidden_one_by_one(
    reader: VarlenBert | PaddedBert, head: nn.Module, feed: Feed, row: int, hidden: np.ndarray, mask_id: int
) -> torch.Tensor:
    """The summed cross-entropy of the tokens at places `hidden` of a text, each of them hidden in a copy of its own."""
    inputs = feed.batch(np.full(len(hidden), row)).inputs
    layout = reader.layout(**inputs)
    places = layout.first + torch.from_numpy(hidden).to(layout.first.device)
    shown = layout._replace(input_ids=layout.input_ids.index_fill(0, places, mask_id))
    logits = head(reader.encode(shown, places)).float()
    return functional.cross_entropy(logits, layout.input_ids[places], reduction="sum")
