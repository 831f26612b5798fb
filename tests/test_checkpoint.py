"""Where models begin: our own tokenizer, folders, the Hub's protocol; and nothing that runs code."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, XLNetConfig, XLNetForSequenceClassification

import models
from sentiment import checkpoint, tokens
from sentiment.errors import CheckpointError
from sentiment.files import read_json, write_json
from sentiment.params import Model

ROOT = Path(__file__).parents[1]
NAMES = ["negativo", "positivo"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Payload:
    """A pickled object that makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def model_settings(**changes):
    return Model(**models.settings().model.model_dump() | changes)


@pytest.fixture
def folder(tmp_path):
    """A masked language model in the Hub's layout, with random weights."""
    path = tmp_path / "bert"
    tokenizer = models.tokenizer_in(path, models.reviews()[0])
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(1)
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, **sizes)
    BertForMaskedLM(config).save_pretrained(path)
    return path


def load(path, max_length=32, **changes):
    tokenizer = tokens.load_tokenizer(path, max_length)
    return checkpoint.load_model(model_settings(checkpoint=str(path), **changes), NAMES, tokenizer, max_length)


def test_a_learnt_tokenizer_is_the_same_in_every_process(tmp_path):
    script = "import models, sys, pathlib; models.tokenizer_in(pathlib.Path(sys.argv[1]), models.reviews()[0])"
    found = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed)], cwd=ROOT, env=environment, check=True)
        found.add((tmp_path / seed / "tokenizer.json").read_bytes())
    assert len(found) == 1


def test_transformers_reads_a_learnt_tokenizer_as_it_was_written(tmp_path):
    texts, _ = models.reviews()
    ours = models.tokenizer_in(tmp_path, texts)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*texts[:5], "PÉSSIMO!! não é bom 😡", ""]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids


def test_a_folder_keeps_its_encoder_and_gets_a_head(folder):
    made = load(folder)
    kept = BertForMaskedLM.from_pretrained(folder).bert.encoder.state_dict()
    assert all(torch.equal(value, made.bert.encoder.state_dict()[name]) for name, value in kept.items())
    assert made.config.id2label == {0: "negativo", 1: "positivo"}


def saved_as(folder, rename):
    weights = {rename(name): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_weights_by_names_that_the_model_does_not_have_are_refused(folder):
    saved_as(folder, lambda name: f"model.{name}")
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the weights that its config.json asks for, bert\..* save both with"):
        load(folder)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"max_position_embeddings": 128}])
def test_weights_of_another_size_than_the_configuration_s_are_refused(folder, change):
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | change)
    with pytest.raises(CheckpointError, match=r"lacks .* do not belong together"):
        load(folder)


def test_a_head_is_kept_where_it_tells_the_same_labels_in_the_same_order_and_drawn_anew_where_not(folder):
    torch.manual_seed(0)
    load(folder).save_pretrained(folder)
    head = load_file(folder / "model.safetensors")["classifier.weight"]
    torch.manual_seed(1)
    assert torch.equal(load(folder).classifier.weight, head)
    tokenizer = tokens.load_tokenizer(folder, 32)
    settings = model_settings(checkpoint=str(folder))
    for labels in (["positivo", "negativo"], ["ruim", "bom"], ["ruim", "médio", "bom"]):
        made = checkpoint.load_model(settings, labels, tokenizer, 32)
        assert made.classifier.weight.shape == (len(labels), 32)
        assert not torch.isin(made.classifier.weight, head).any()
        assert made.classifier.weight.std() < 0.05
        assert list(made.config.id2label.values()) == labels


def test_a_checkpoint_without_a_limit_of_positions_loads(tmp_path):
    tokenizer = models.tokenizer_in(tmp_path, models.reviews()[0])
    config = XLNetConfig(vocab_size=tokenizer.get_vocab_size(), d_model=32, n_layer=1, n_head=2, d_inner=64)
    XLNetForSequenceClassification(config).save_pretrained(tmp_path)
    assert load(tmp_path).config.model_type == "xlnet"


def test_weights_in_pytorch_model_bin_load(folder):
    model = BertForMaskedLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    made = load(folder)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(made.bert.state_dict()[name], model.bert.state_dict()[name])


def test_a_pickle_with_code_is_refused_and_not_run(folder, tmp_path):
    torch.save({"bert.embeddings.word_embeddings.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_remote_code_in_a_checkpoint_is_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = (folder / "config.json").read_text()
    auto = '{"auto_map": {"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Config"},'
    (folder / "config.json").write_text(config.replace("{", auto, 1))
    load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": "nowhere/at/all"}, "no folder here and no Hub name"),
        ({"checkpoint": "someone/bert"}, r"model\.revision"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_says_what_to_mend(folder, changes, words):
    tokenizer = tokens.load_tokenizer(folder, 32)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_model(model_settings(**changes), NAMES, tokenizer, 32)


def test_a_folder_without_weights_says_what_it_needs(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json, the weights and the tokenizer"):
        load(folder)


def test_a_folder_without_a_vocabulary_is_refused(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError):
        checkpoint.save_tokenizer(model_settings(checkpoint=str(folder)), [], tmp_path / "out")


def test_more_tokens_than_positions_are_refused(folder):
    with pytest.raises(CheckpointError, match="at most 64 tokens"):
        load(folder, max_length=65)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as `from_pretrained` needs, over a folder."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        super().__init__(*arguments)

    def do_HEAD(self):
        self.answer(send_body=False)

    def do_GET(self):
        self.answer(send_body=True)

    def answer(self, send_body):
        parts = self.path.split("?")[0].split("/")
        file = self.folder / parts[-1]
        if parts[:3] != ["", "someone", "bert"] or parts[3:5] != ["resolve", COMMIT] or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        for name, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{hashlib.sha256(content).hexdigest()}"')):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send_body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_a_hub_name_loads_through_the_hubs_protocol(folder, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = (
        "import pathlib, models; from sentiment import checkpoint, tokens; from sentiment.params import Model\n"
        f"s = Model(**models.settings().model.model_dump() | {{'checkpoint': 'someone/bert', 'revision': '{COMMIT}'}})\n"
        "p = pathlib.Path('tokenizer'); checkpoint.save_tokenizer(s, [], p); t = tokens.load_tokenizer(p, 32)\n"
        "m = checkpoint.load_model(s, ['negativo', 'positivo'], t, 32); print(checkpoint.commit(s))\n"
    )
    shutil.copy(ROOT / "params.yaml", tmp_path)
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    server.shutdown()
    assert done.stdout.strip() == COMMIT, done.stderr[-2000:]


def test_a_checkpoint_s_licence_is_what_its_card_says(tmp_path):
    asked = model_settings(checkpoint=str(tmp_path))
    assert checkpoint.licence(asked) is None
    (tmp_path / "README.md").write_text("---\nlanguage: pt\nlicense: cc-by-nc-sa-4.0\ntags: [bert]\n---\n\n# Um modelo\n")
    assert checkpoint.licence(asked) == "cc-by-nc-sa-4.0"
    (tmp_path / "README.md").write_text("# Um modelo\n\nlicense: mit\n")
    assert checkpoint.licence(asked) is None


def test_the_shipped_checkpoint_is_small_and_says_what_it_may_be_used_for():
    folder = ROOT / "models" / "base"
    weights = load_file(folder / "model.safetensors")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20e6
    assert sum(weight.numel() for weight in weights.values()) <= 15e6
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert checkpoint.licence(model_settings(checkpoint=str(folder))) == "cc-by-nc-sa-4.0"
    assert "no commercial use" in (folder / "README.md").read_text(encoding="utf-8")
    assert len(AutoTokenizer.from_pretrained(folder)("Ótimo produto!")["input_ids"]) > 3
