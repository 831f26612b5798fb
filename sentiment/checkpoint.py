"""Where a model begins: a checkpoint of the Hub or of a folder, or a small BERT of our own from scratch."""

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sentiment.errors import CheckpointError
from sentiment.logs import first_line
from sentiment.params import Model
from sentiment.tokens import LENGTH_STEP

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # what transformers reads it from
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
ALPHABET = 1000  # characters a vocabulary of our own holds at most
MIN_FREQUENCY = 2
log = logging.getLogger(__name__)


def arguments(settings: Model) -> dict[str, Any]:
    """What every `from_pretrained` of a checkpoint gets: the revision of a Hub name, and never remote code.

    Raises CheckpointError where the checkpoint is neither a folder nor a Hub name with a revision.
    """
    name = settings.checkpoint or ""
    if Path(name).is_dir():
        return {"trust_remote_code": False, "local_files_only": True}
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"model.checkpoint names {name!r}, which is no folder here and no Hub name (OWNER/NAME)")
    if not settings.revision:
        raise CheckpointError(
            f"model.checkpoint names {name}, which is no folder here, so it is looked for on the Hub: pin its commit with "
            "model.revision, or correct the path"
        )
    if not re.fullmatch(r"[0-9a-f]{40}", settings.revision):
        log.warning("model.revision %s is no commit (40 hexadecimal digits), so the Hub may change it", settings.revision)
    return {"trust_remote_code": False, "revision": settings.revision}


def failure(settings: Model, error: Exception) -> CheckpointError:
    """The error to raise when a checkpoint could not be loaded."""
    where = "" if Path(settings.checkpoint or "").is_dir() else f" at revision {settings.revision}"
    return CheckpointError(
        f"model.checkpoint {settings.checkpoint}{where} cannot be loaded ({type(error).__name__}: {first_line(error)}); "
        "check the name, the revision and the network, or that the folder holds config.json, the weights and the tokenizer"
    )


def files(settings: Model) -> list[tuple[str, int, int]]:
    """The files of a checkpoint's folder: name, bytes and time of change in ns; none of a Hub name's, which has a revision."""
    folder = Path(settings.checkpoint or "")
    if settings.checkpoint is None or not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]


def commit(settings: Model) -> str | None:
    """The commit of the Hub that the checkpoint's files are of, or None for a folder or a BERT from scratch."""
    if settings.checkpoint is None or Path(settings.checkpoint).is_dir():
        return None
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(settings.checkpoint, "config.json", revision=settings.revision)).parent.name


def licence(settings: Model) -> str | None:
    """What the model card of a checkpoint's folder says in its header; None where it says nothing, and for a Hub name."""
    page = Path(settings.checkpoint or "") / "README.md"
    if settings.checkpoint is None or not page.is_file():
        return None
    found = re.search(r"\A---\n(?:.*\n)*?license:\s*(\S+)\n(?:.*\n)*?---\n", page.read_text(encoding="utf-8"))
    return found[1] if found else None


def save_tokenizer(settings: Model, texts: Iterable[str], folder: Path) -> None:
    """Write the tokenizer to `folder` in the Hub's layout: the checkpoint's own, or one learnt from `texts`.

    The texts are gone through twice, so that an iterator will not do. Raises CheckpointError if the checkpoint has none.
    """
    if settings.checkpoint is None:
        save_word_piece(word_piece(texts, settings.vocab_size), folder)
        return
    source = Path(settings.checkpoint)
    if all((source / name).is_file() for name in TOKENIZER[:2]):  # a folder's, without importing what would read it
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    else:
        convert_tokenizer(settings, folder)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{settings.checkpoint} has no fast tokenizer; a tokenizer.json is needed")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise failure(settings, error) from error
    if tokenizer.get_vocab_size() <= sum(token.special for token in tokenizer.get_added_tokens_decoder().values()):
        raise CheckpointError(f"{settings.checkpoint} has no vocabulary; put its tokenizer.json or vocab.txt beside the weights")


def convert_tokenizer(settings: Model, folder: Path) -> None:
    """Write the tokenizer of a Hub name, or of a folder without a tokenizer.json, as transformers makes it."""
    keywords = arguments(settings)
    try:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(settings.checkpoint, use_fast=True, **keywords).save_pretrained(folder)
    except Exception as error:
        raise failure(settings, error) from error


def word_piece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A cased WordPiece tokenizer learnt from `texts`, which are gone through twice: the same for the same texts.

    The library numbers the continuing characters (##a) as a hash table yields them, and breaks ties by those numbers; naming
    them beforehand, in order, makes the vocabulary reproducible.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    seen = [char for char in counts if not char.isspace()]
    alphabet = sorted(sorted(seen, key=lambda char: (-counts[char], char))[:ALPHABET])
    special = list(SPECIAL.values())
    learner = bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(special) + 2 * len(alphabet)),
        min_frequency=MIN_FREQUENCY,
        special_tokens=special + ["##" + char for char in alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab()
    tokenizer = bert_tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def bert_tokenizer(model: models.Model) -> Tokenizer:
    """BERT's own normalisation and splitting, cased, before `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def save_word_piece(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as transformers reads it: tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": False, **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(settings: Model, labels: Sequence[str], tokenizer: Tokenizer, max_length: int) -> "PreTrainedModel":
    """A sequence classifier with an output for each label, its head (and, with no checkpoint, all of it) drawn at random.

    The head of a checkpoint that tells these very labels, in this order, is kept. Draws from torch's global generator: seed it
    first. Raises CheckpointError if the checkpoint cannot be loaded, lacks weights below its head, or takes no sequence of
    `max_length` tokens.
    """
    no_progress_bars()
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
    if settings.checkpoint is None:
        return small_bert(settings, names, tokenizer, max_length)
    from transformers import AutoConfig, AutoModelForSequenceClassification

    keywords = arguments(settings)
    try:
        import torch

        told = AutoConfig.from_pretrained(settings.checkpoint, **keywords).id2label
        with warnings_left_out():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                settings.checkpoint, dtype=torch.float32, weights_only=True, ignore_mismatched_sizes=True,
                output_loading_info=True, **names, **keywords,
            )  # fmt: skip
    except Exception as error:
        raise failure(settings, error) from error
    check_weights(settings, model, info)
    if [told[k] for k in sorted(told)] != list(labels):
        draw_head(model, len(labels), {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    check_sizes(settings, model.config, tokenizer, "tokenize.max_length", max_length)
    return model


def check_weights(settings: Model, model: Any, info: dict[str, Any]) -> None:
    """Raise CheckpointError if a checkpoint lacks weights below its head, but for a pooler, or has others of their size."""
    below = f"{model.base_model_prefix}."
    found = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if lost := sorted(name for name in found if name.startswith(below) and ".pooler." not in name):
        raise CheckpointError(
            f"{settings.checkpoint} lacks {len(lost)} of the weights that its config.json asks for, {lost[0]} for one: they do "
            "not belong together; save both with `model.save_pretrained(folder)`"
        )


def draw_head(model: Any, classes: int, drawn: set[str]) -> None:
    """Draw the last layer anew, which tells other labels, unless it was `drawn` already."""
    from torch import nn

    below = f"{model.base_model_prefix}."
    for name, layer in model.named_modules():
        is_last = isinstance(layer, nn.Linear) and layer.out_features == classes and not name.startswith(below)
        if is_last and f"{name}.weight" not in drawn:
            nn.init.normal_(layer.weight, std=getattr(model.config, "initializer_range", 0.02))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            log.info("%s tells other labels: its last layer is drawn anew", name)


def check_sizes(settings: Model, config: Any, tokenizer: Tokenizer, key: str, max_length: int) -> None:
    """Raise CheckpointError if a checkpoint takes no sequence of as many tokens as `key` says, or not all of its tokenizer's."""
    positions = getattr(config, "max_position_embeddings", max_length)  # below 1 where there is no limit
    longest = positions // LENGTH_STEP * LENGTH_STEP if positions > 0 else max_length
    if max_length > longest:
        raise CheckpointError(f"{key} is {max_length}, but {settings.checkpoint} takes at most {longest} tokens; lower it")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{settings.checkpoint} has {config.vocab_size} embeddings for {tokenizer.get_vocab_size()} tokens: its "
            "weights and its tokenizer do not belong together"
        )


@contextmanager
def warnings_left_out() -> Iterator[None]:
    """Keep transformers from reporting which weights a checkpoint lacks or has too many, as most have: see check_weights."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def no_progress_bars() -> None:
    """Keep transformers from drawing a bar for each file that it reads or writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def small_bert(settings: Model, names: dict[str, Any], tokenizer: Tokenizer, max_length: int) -> "PreTrainedModel":
    """A BERT classifier of the sizes in params.yaml, with random weights."""
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(small_config(settings, tokenizer, max_length, **names))


def small_config(settings: Model, tokenizer: Tokenizer, max_length: int, **more: Any) -> Any:
    """The configuration of a BERT of the sizes that the parameters give."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        max_position_embeddings=-(-max_length // LENGTH_STEP) * LENGTH_STEP,
        pad_token_id=tokenizer.token_to_id("[PAD]"),
        **more,
    )
