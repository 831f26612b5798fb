"""Batches of a fixed shape, and steps that are recorded and replayed: the same losses and gradients as without."""

import contextlib

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from sentiment.feed import IGNORED
from sentiment.replay import Replay
from test_pretraining import run_in
from test_training import loop_in

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are CUDA's")


def no_dropout(model):
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0


class Recomputed(Replay):
    """What CUDA graphs do, by computing it anew."""

    def graph(self, pool):
        loss, sets, replay = torch.zeros(()), pool is None, self
        if sets:
            self.compute()

        class Graph:
            replays = 0

            def pool(self):
                return "of the first"

            def replay(self):
                if sets:
                    replay.attach()
                    torch._foreach_zero_([gradient for gradient in replay.gradients if gradient is not None])
                loss.copy_(replay.compute())
                Graph.replays += 1

        return Graph(), loss


def shaped(loop):
    """The loop, its batches replayed as on CUDA."""
    plan = loop.feed.in_random_order(loop.settings.batch_tokens, np.random.default_rng(0))
    vars(loop)["shape"] = shape = loop.feed.shape(loop.settings.batch_tokens, plan)
    rows = next(rows for rows in plan if loop.replays(rows))
    parameters = list(loop.module.parameters())
    vars(loop)["replay"] = Recomputed(loop.loss_of, loop.accelerator.backward, parameters, loop.inputs(rows, shape)).record()
    return loop


@pytest.fixture(autouse=True)
def another_precision():
    """Accelerate keeps the device and the precision of a process: these tests have others."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_generator_of_cuda(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.random, "fork_rng", lambda *_: contextlib.nullcontext())


def gradients(loop):
    return [None if each.grad is None else each.grad.float().cpu().clone() for each in loop.module.parameters()]


def assert_close(found, expected, share):
    """Each is away from what is expected by less than this share of its norm."""
    assert [each is None for each in found] == [each is None for each in expected]
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            assert (one - other).norm() <= share * other.norm() + 1e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_batch_in_a_shape_has_the_loss_and_the_gradients_of_the_same_batch_without(tmp_path, device):
    precision = "fp32" if device == "cpu" else "bf16"
    loop, _ = loop_in(tmp_path, change=no_dropout, batching="packed", batch_tokens=256, device=device, precision=precision)
    loop = loop if device == "cuda" else shaped(loop)
    rows = next(rows for rows in loop.feed.in_random_order(256, np.random.default_rng(1)) if loop.replays(rows))
    batch = loop.feed.batch(rows, loop.shape)
    assert batch.inputs["input_ids"].shape == batch.inputs["positions"].shape == (loop.shape.tokens,)
    assert (batch.labels != IGNORED).sum() == len(rows)
    assert batch.inputs["bounds"].diff().max() <= batch.inputs["longest"] == loop.shape.longest
    share = 1e-4 if device == "cpu" else 0.05
    found = []
    for inputs in (loop.inputs(rows), loop.inputs(rows, loop.shape)):
        loop.optimizer.zero_grad()
        loss = loop.loss_of(inputs)
        loss.backward()
        found.append((loss.detach(), gradients(loop)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=share, atol=0)
    assert_close(found[1][1], found[0][1], share)


def test_what_does_not_fill_a_shape_has_not_that_shape(tmp_path):
    loop = shaped(loop_in(tmp_path, batching="packed", batch_tokens=256)[0])
    feed, shape = loop.feed, loop.shape
    plan = feed.in_random_order(256, np.random.default_rng(2))
    assert sum(feed.has_shape(rows, shape) for rows in plan) >= len(plan) - 2
    assert not feed.has_shape(np.argsort(feed.lengths)[:1], shape._replace(tokens=1024))
    assert not feed.has_shape(plan[0], shape._replace(tokens=128))
    assert not feed.has_shape(plan[0], shape._replace(reviews=len(plan[0]) - 1))


@pytest.mark.parametrize("changes", [{}, {"adversarial": 0.5}, {"accumulation": 3}, {"accumulation": 2, "adversarial": 0.5}])
def test_a_replayed_run_ends_with_the_weights_of_one_that_is_not(tmp_path, changes):
    """The recording is played by computing it; what is tested is which gradients are set, and which are added to."""
    ends = []
    for name, make in (("plain", lambda loop: loop), ("replayed", shaped)):
        loop = make(loop_in(tmp_path / name, change=no_dropout, batching="packed", batch_tokens=256, epochs=2, **changes)[0])
        replay = vars(loop).get("replay")
        loop.run()
        ends.append({key: value.clone() for key, value in loop.base.state_dict().items()})
    assert replay.setting.replays > 0
    assert replay.adding.replays > 0 or not changes
    assert "replay" not in vars(loop)
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, atol=2e-5, rtol=1e-3)


def test_pre_training_is_replayed_as_it_is_computed(tmp_path):
    found = []
    for name, make in (("plain", lambda loop: loop), ("replayed", shaped)):
        loop = make(run_in(tmp_path / name, objective="mlm", batching="packed", batch_tokens=256)[0])
        rows = next(iter(loop.feed.in_random_order(256, np.random.default_rng(1))))
        torch.manual_seed(5)
        loss = loop.add_gradients([rows])
        found.append((loss, gradients(loop)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.1, atol=0.1)  # padding draws numbers, too: other words are hidden
    assert [each is None for each in found[0][1]] == [each is None for each in found[1][1]]


@CUDA
@pytest.mark.parametrize("changes", [{}, {"adversarial": 0.5}, {"accumulation": 3}])
def test_on_cuda_a_replayed_step_has_the_loss_and_the_gradients_of_one_that_is_not(tmp_path, changes):
    wanted = {"batching": "packed", "batch_tokens": 256, "device": "cuda", "precision": "bf16", "lr": 1e-30, "epochs": 1}
    found = []
    for graphs in (False, True):
        loop, _ = loop_in(tmp_path / str(graphs), change=no_dropout, cuda_graphs=graphs, **wanted, **changes)
        loop.model.train()
        steps = loop.feed.in_random_order(256, np.random.default_rng(3))[:6]
        each = []
        for rows in steps:
            loss = loop.add_gradients([rows, *steps[: loop.settings.accumulation - 1]])
            loop.add_more_gradients([rows])
            each.append((float(loss), gradients(loop)))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        found.append(each)
    assert sum(loop.replays(rows) for rows in steps) >= 4
    for (loss, plain), (other, replayed) in zip(*found, strict=True):
        assert other == pytest.approx(loss, rel=1e-2)
        assert_close(replayed, plain, 0.05)


def test_a_last_batch_of_few_texts_is_not_computed_with_as_many_hidden_tokens_as_others_have(tmp_path):
    loop = shaped(run_in(tmp_path, objective="mlm", batching="packed", batch_tokens=256)[0])
    plan = loop.feed.in_random_order(256, np.random.default_rng(1))
    few = np.argsort(-loop.feed.lengths)[:5]
    assert loop.feed.has_shape(few, loop.shape)
    assert not loop.replays(few)
    for rows in filter(loop.replays, plan):
        assert loop.inputs(rows, loop.shape)["count"] == pytest.approx(loop.inputs(rows)["count"], rel=0.03)


def test_gradients_that_are_not_the_recordings_own_are_not_added_to(tmp_path):
    loop = shaped(loop_in(tmp_path, batching="packed", batch_tokens=256)[0])
    rows = next(rows for rows in loop.feed.in_random_order(256, np.random.default_rng(1)) if loop.replays(rows))
    loop.loss(rows).backward()
    with pytest.raises(RuntimeError, match="begin"):
        loop.add_gradients([rows])


@CUDA
@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_on_cuda_pre_training_that_is_replayed_learns_as_much(tmp_path, objective):
    wanted = {"objective": objective, "batching": "packed", "batch_tokens": 256, "device": "cuda", "precision": "bf16"}
    ends = []
    for graphs in (False, True):
        loop, _, _ = run_in(tmp_path / str(graphs), cuda_graphs=graphs, epochs=2, **wanted)
        ends.append(loop.run().history[-1])
    names = [name for name in ends[0] if name.startswith("held_out")]
    assert names
    for name in names:
        assert ends[1][name] == pytest.approx(ends[0][name], rel=0.1)


@CUDA
def test_on_cuda_recording_draws_no_numbers_and_dropout_is_drawn_anew_in_each_replay(tmp_path):
    loop, _ = loop_in(tmp_path, batching="packed", batch_tokens=256, device="cuda", precision="bf16", lr=1e-30)
    loop.model.train()
    rows = next(rows for rows in loop.feed.in_random_order(256, np.random.default_rng(3)) if loop.replays(rows))
    before = torch.cuda.get_rng_state()
    assert loop.replay
    assert torch.equal(before, torch.cuda.get_rng_state())
    one, other = (float(loop.replay(loop.inputs(rows, loop.shape), 1.0)) for _ in range(2))
    assert one != other
