"""The training loop: deterministic, resumable, and right in its sums."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

import models
from sentiment import checkpoint, tokens, training
from sentiment.bert import packs
from sentiment.errors import TrainingError
from sentiment.files import read_json
from sentiment.loop import parameter_groups, rate, seed, state_of

ROOT = Path(__file__).parents[1]
NAMES = ["negativo", "positivo"]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("sentiment").setLevel(logging.INFO)


def loop_in(folder, fingerprint="one", change=lambda model: None, **changes):
    """A run that is ready to start in `folder`, and the list that its logged points go to."""
    settings = models.settings(**changes)
    texts, labels = models.reviews()
    tokenizer = models.tokenizer_in(folder / "tokenizer", texts)
    rows = tokens.ragged(tokens.encode(tokenizer, texts), labels, tokenizer.get_vocab_size())
    held_out, truth = models.reviews(60, seed=1)
    validation = tokens.ragged(tokens.encode(tokenizer, held_out), truth, tokenizer.get_vocab_size())
    seed(settings.train.seed)
    model = checkpoint.load_model(settings.model, NAMES, tokenizer, settings.tokenize.max_length)
    change(model)
    points = []
    loop = training.FineTuning(
        model, rows, validation, 0, NAMES, settings.train, folder / "checkpoint", fingerprint, lambda *point: points.append(point)
    )
    return loop, points


def weights(loop):
    return save({name: value.contiguous() for name, value in loop.base.state_dict().items()})


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    runs = []
    for number, value in enumerate((1, 1, 2)):
        loop, _ = loop_in(tmp_path / str(number), seed=value)
        loop.run()
        runs.append(weights(loop))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("stop_at", [2, 5, 9])
def test_an_interrupted_run_ends_with_the_weights_and_points_of_a_whole_one(tmp_path, stop_at):
    whole, expected = loop_in(tmp_path / "whole")
    whole.run()
    first, _ = loop_in(tmp_path / "cut")
    step = first.step

    def interrupting(rows):
        if first.progress.step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return step(rows)

    first.step = interrupting
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second, points = loop_in(tmp_path / "cut")
    second.run()
    assert second.progress.step > stop_at
    assert weights(second) == weights(whole)
    assert [step for step, _ in points] == [step for step, _ in expected]
    assert all(a == pytest.approx(b) for (_, a), (_, b) in zip(points, expected, strict=True))


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole, _ = loop_in(tmp_path / "whole", epochs=5, patience=None)
    whole.run()
    script = "import pathlib, test_training as t\nloop, _ = t.loop_in(pathlib.Path('cut'), epochs=5, patience=None); loop.run()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    while process.poll() is None and not list(tmp_path.glob("cut/checkpoint/step-*")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert list(tmp_path.glob("cut/checkpoint/step-*"))
    resumed, points = loop_in(tmp_path / "cut", epochs=5, patience=None)
    resumed.resume()
    assert resumed.progress.step > 0
    assert points
    again, _ = loop_in(tmp_path / "cut", epochs=5, patience=None)
    again.run()
    assert weights(again) == weights(whole)


def test_another_fingerprint_starts_afresh(tmp_path):
    loop, _ = loop_in(tmp_path)
    loop.run()
    other, points = loop_in(tmp_path, fingerprint="two")
    other.resume()
    assert other.progress.step == 0
    assert points == []


def test_the_best_epoch_is_kept_and_patience_ends_the_run(tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.7, 0.6, 0.99])
    real, seen = training.metrics.score, []
    monkeypatch.setattr(training.metrics, "score", lambda *args: real(*args) | {"f1_macro": next(scores)})
    loop, _ = loop_in(tmp_path, epochs=5, patience=2, ties=0.0)
    is_last = loop.is_last
    loop.is_last = lambda: (seen.append(weights(loop)), is_last())[1]
    result = loop.run()
    assert result.best_epoch == 2
    assert len(result.history) == 4
    assert weights(loop) == seen[1]


@pytest.mark.parametrize(
    ("below", "kept", "epochs"),
    [((0.0, 0.9, 0.9), 3, 3), ((0.0, 1.1, 0.9), 3, 3), ((0.0, 0.9, 1.5), 2, 3), ((0.0, 1.1, 1.1, 0.5), 1, 3)],
)
def test_of_epochs_that_cannot_be_told_apart_the_last_is_kept(tmp_path, monkeypatch, below, kept, epochs):
    loop, _ = loop_in(tmp_path, epochs=len(below), patience=2, ties=1.0)
    error = (0.9 * 0.1 / len(loop.validation_labels)) ** 0.5
    scores, real = iter([0.9 - number * error for number in below]), training.metrics.score
    monkeypatch.setattr(training.metrics, "score", lambda *args: real(*args) | {"f1_macro": next(scores), "accuracy": 0.9})
    result = loop.run()
    assert (result.best_epoch, len(result.history)) == (kept, epochs)


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_a_step_of_two_batches_is_the_step_of_the_two_together(tmp_path, adversarial):
    calm = {"lr": 1e-3, "adversarial": adversarial}
    one, _ = loop_in(tmp_path / "one", change=no_dropout, **calm)
    two, _ = loop_in(tmp_path / "two", change=no_dropout, **calm)
    rows = np.arange(24)
    losses = one.step([rows]), two.step([rows[:5], rows[5:]])
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)
    for first, second in zip(one.base.parameters(), two.base.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_an_adversarial_step_adds_the_gradients_where_the_loss_rises_fastest(tmp_path, monkeypatch):
    """Against the same sums by torch's own autograd, through transformers' forward."""
    loop, _ = loop_in(tmp_path, change=no_dropout, adversarial=0.7, lr=1e-30, max_grad_norm=1e9)
    rows, found = np.arange(20), {}
    batch = loop.feed.batch(rows)
    model, table = loop.base, loop.base.get_input_embeddings().weight
    before = table.detach().clone()

    def gradients():
        summed = cross_entropy(model(**batch.inputs).logits, batch.labels, reduction="sum") / loop.step_weight
        return torch.autograd.grad(summed, list(model.parameters()))

    plain = dict(zip((name for name, _ in model.named_parameters()), gradients(), strict=True))
    direction = plain["bert.embeddings.word_embeddings.weight"]
    with torch.no_grad():
        table += 0.7 * direction / direction.norm()
    moved = dict(zip(plain, gradients(), strict=True))
    with torch.no_grad():
        table.copy_(before)
    step = loop.optimizer.step
    seen = lambda: found.update({name: each.grad.clone() for name, each in model.named_parameters()})  # noqa: E731
    monkeypatch.setattr(loop.optimizer, "step", lambda: (seen(), step()))
    loss = float(loop.step([rows]))
    assert loss == pytest.approx(loop.loss(rows).item() / loop.step_weight, rel=1e-5)
    assert torch.equal(table, before)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name] + moved[name], atol=1e-6, rtol=1e-4)
    assert not torch.allclose(found["classifier.weight"], 2 * plain["classifier.weight"], rtol=1e-3)


def test_a_gradient_that_is_no_number_does_not_reach_the_embeddings(tmp_path):
    loop, _ = loop_in(tmp_path, adversarial=0.5, lr=1e-30)
    table = loop.base.get_input_embeddings().weight
    before = table.detach().clone()
    loop.add_gradients([np.arange(8)])
    table.grad[3, 2] = float("inf")
    loop.add_more_gradients([np.arange(8)])
    assert torch.equal(table, before)


def test_the_loss_is_torchs_own_weighted_and_smoothed_mean(tmp_path):
    changes = {"class_weights": {"negativo": 3.0, "positivo": 1.0}, "label_smoothing": 0.1}
    loop, _ = loop_in(tmp_path, change=no_dropout, **changes)
    rows = np.arange(20)
    batch = loop.feed.batch(rows)
    logits = loop.base(**batch.inputs).logits
    expected = cross_entropy(logits, batch.labels, torch.tensor([3.0, 1.0]), label_smoothing=0.1)
    assert float(loop.step([rows])) * loop.step_weight / loop.weight(rows) == pytest.approx(expected.item(), rel=1e-5)


def test_a_review_counts_the_same_in_a_batch_of_many_and_of_few(tmp_path):
    loop, _ = loop_in(tmp_path, change=no_dropout, lr=1e-30)
    together = float(loop.step([np.arange(20)]))
    apart = float(loop.step([np.arange(3)])) + float(loop.step([np.arange(3, 20)]))
    assert together == pytest.approx(apart, rel=1e-4)


def test_the_logged_loss_is_the_mean_over_the_reviews(tmp_path):
    loop, points = loop_in(tmp_path, change=no_dropout, lr=1e-30, epochs=1, log_every=1000)
    expected = loop.loss(np.arange(len(loop.feed.lengths))).item() / loop.weight(np.arange(len(loop.feed.lengths)))
    loop.run()
    assert points[0][1]["train/loss"] == pytest.approx(expected, rel=1e-3)


def test_balanced_weights_follow_the_formula():
    balanced = models.settings(class_weights="balanced").train
    assert training.class_weights(np.array([10, 30]), balanced, NAMES).tolist() == pytest.approx([2.0, 2 / 3])


def test_norms_and_biases_do_not_decay(tmp_path):
    loop, _ = loop_in(tmp_path)
    decayed, free = parameter_groups(loop.base, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    named = {id(p): name for name, p in loop.base.named_parameters()}
    assert all("bias" in named[id(p)] or "LayerNorm" in named[id(p)] for p in free["params"])
    assert not any("bias" in named[id(p)] or "LayerNorm" in named[id(p)] for p in decayed["params"])


def test_the_rate_falls_from_each_layer_to_the_one_below(tmp_path):
    settings = models.settings().model
    tokenizer = models.tokenizer_in(tmp_path, models.reviews()[0])
    base = checkpoint.load_model(settings.model_copy(update={"layers": 3}), NAMES, tokenizer, 32)
    scales = {id(p): group["scale"] for group in parameter_groups(base, 0.1, 0.5) for p in group["params"]}
    named = dict(base.named_parameters())
    assert len(scales) == len(named)
    found = [
        scales[id(named[name])]
        for name in (
            "classifier.weight", "bert.pooler.dense.bias", "bert.encoder.layer.2.output.dense.weight",
            "bert.encoder.layer.0.attention.self.query.bias", "bert.embeddings.word_embeddings.weight",
        )
    ]  # fmt: skip
    assert found == [1.0, 1.0, 0.5, 0.125, 0.0625]


def test_a_step_moves_the_embeddings_by_their_share_of_the_rate(tmp_path):
    moved = {}
    for decay in (1.0, 0.1):
        loop, _ = loop_in(tmp_path / str(decay), layer_decay=decay, epochs=1, weight_decay=0.0)
        before = {name: value.detach().clone() for name, value in loop.base.named_parameters()}
        loop.step([np.arange(8)])
        moved[decay] = {name: float((value.detach() - before[name]).abs().max()) for name, value in loop.base.named_parameters()}
    ratio = {
        name: moved[0.1][name] / moved[1.0][name] for name in ("classifier.weight", "bert.embeddings.word_embeddings.weight")
    }
    assert list(ratio.values()) == pytest.approx([1.0, 0.01], rel=1e-2)


def test_a_model_without_numbered_layers_has_no_layer_decay():
    with pytest.raises(TrainingError, match=r"train\.layer_decay needs a model of numbered layers"):
        parameter_groups(torch.nn.Linear(2, 2), 0.1, 0.9)


@pytest.mark.parametrize(("decay", "last"), [("linear", 0.01), ("cosine", 0.001), ("constant", 1.0)])
def test_the_rate_climbs_then_decays(decay, last):
    settings = models.settings(decay=decay, warmup=0.1).train
    rates = [rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(last, abs=0.011)


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"precision": "fp16"}])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test says is missing")
def test_what_the_machine_has_not_is_said(tmp_path, changes):
    with pytest.raises(TrainingError, match=r"train\.(device|precision)"):
        loop_in(tmp_path, **changes)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    loop, _ = loop_in(tmp_path, change=lambda model: model.classifier.weight.data.fill_(float("inf")))
    with pytest.raises(TrainingError, match=r"lower train\.lr"):
        loop.run()


SCRIPT = """
import json, pathlib, signal, sys, test_training as t
from sentiment.loop import state_of
folder, stop = pathlib.Path(sys.argv[1]), sys.argv[2:]
state = state_of(t.models.settings().train)
loop, points = t.loop_in(folder / str(state.process_index), change=t.no_dropout, adversarial=0.5)
loop.folder = folder / "checkpoint" if stop != ["apart"] else loop.folder
step, began = loop.step, []
def interrupted(rows):
    began.append(loop.progress.step)
    if stop and stop[0].isdigit() and loop.progress.step == int(stop[0]) and state.process_index == 1:
        signal.raise_signal(signal.SIGTERM)
    return step(rows)
loop.step = interrupted
try:
    loop.run()
except KeyboardInterrupt:
    (folder / f"stopped-{state.process_index}").write_text(str(loop.progress.step))
else:
    if state.is_main_process:
        (folder / "points.json").write_text(json.dumps([state.num_processes, began[0], points]))
"""


@pytest.fixture
def processes(tmp_path):
    """Trains in so many processes in a folder; returns how it ended, the first step, and the points of the loss curve."""
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}

    def train(number, folder, *stop):
        several = ["--multi_gpu"] if number > 1 else []
        launch = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(number)]
        command = [*launch, "--main_process_port", "0", str(tmp_path / "run.py"), str(tmp_path / folder), *stop]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
        found = tmp_path / folder / "points.json"
        ran, began, points = read_json(found) if found.is_file() else (number, 0, [])
        assert ran == number
        return done, began, points

    return train


@pytest.mark.slow
def test_two_processes_follow_the_loss_curve_of_one_and_go_on_where_one_of_them_was_stopped(processes, tmp_path):
    alone, _, one = processes(1, "one")
    together, _, two = processes(2, "two")
    assert [alone.returncode, together.returncode] == [0, 0], alone.stderr + together.stderr
    stopped, *_ = processes(2, "stopped", "4")
    assert [(tmp_path / "stopped" / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["6", "6"], stopped.stderr
    (last,) = (tmp_path / "stopped" / "checkpoint").glob("step-*")
    assert {path.name for path in last.glob("random_states_*")} == {"random_states_0.pkl", "random_states_1.pkl"}
    _, began, three = processes(2, "stopped")
    assert began == 6
    for (step, expected), *others in zip(one, two, three, strict=True):
        for same, found in others:
            assert step == same
            assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_processes_that_share_no_folder_are_told(processes):
    done, *_ = processes(2, "apart", "apart")
    assert done.returncode != 0
    assert "process 1 does not see" in done.stderr


def test_fewer_processes_than_the_launcher_was_asked_for_are_an_error():
    settings = models.settings(launcher="accelerate launch --num_processes 2").train
    with pytest.raises(TrainingError, match=r"asks for 2 processes, and 1 runs; add --multi_gpu"):
        state_of(settings)


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_compiling_is_for_what_a_layer_does_in_training(tmp_path, monkeypatch, batching):
    calls = []

    def compiled(function, **_):
        return lambda *arguments: (calls.append(torch.is_grad_enabled()), function(*arguments))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    ends = []
    for name, wanted in (("plain", False), ("compiled", True)):
        loop, _ = loop_in(tmp_path / name, batching=batching, compile=wanted, epochs=1)
        before = len(calls)
        loop.run()
        ends.append((weights(loop), len(calls) - before))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1] == 0
    assert ends[1][1] >= loop.progress.step  # a layer each step


def test_packed_batches_train_too_and_have_little_padding(tmp_path, caplog):
    loop, _ = loop_in(tmp_path, batching="packed", epochs=6)
    assert loop.feed.packed
    with caplog.at_level(logging.INFO, "sentiment.loop"):
        result = loop.run()
    assert result.history[-1]["validation_f1_macro"] > 0.8
    assert "padding" in caplog.text


@pytest.mark.parametrize(
    ("capability", "heads", "takes"), [((7, 5), 2, False), ((8, 0), 2, True), ((9, 0), 2, True), ((9, 0), 8, False)]
)
def test_reviews_are_packed_only_where_the_gpu_has_a_kernel_for_the_model(monkeypatch, capability, heads, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=32)
    model, cuda = BertForSequenceClassification(config), torch.device("cuda")
    assert packs(model, cuda, "bf16") is packs(model, cuda, "fp16") is takes
    assert not packs(model, cuda, "fp32")
    assert not packs(model, torch.device("cpu"), "bf16")
    if not takes:
        with pytest.raises(TrainingError, match=r"train\.batching packed: this GPU has no attention kernel .*set it to auto"):
            training.check_packing(model, cuda, "bf16")


def test_packing_what_cannot_be_packed_is_an_error_that_names_the_parameter():
    other = type("Config", (), {"model_type": "distilbert"})
    with pytest.raises(TrainingError, match=r"train\.batching packed is for BERT.*distilbert"):
        training.check_packing(type("Model", (), {"config": other})(), torch.device("cpu"), "bf16")
