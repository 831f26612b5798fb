"""From tokens to a model's inputs, padded and packed: the same reviews, and the same answers of the model."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

from sentiment import tokens
from sentiment.bert import CpuDropout, Layout, PaddedBert, VarlenBert, reader, small_attention, varlen, varlen_first
from sentiment.devices import peak_flops, step_flops
from sentiment.feed import Feed, forward

CPU = torch.device("cpu")
ROWS = [[2, 7, 3], [2, 11, 12, 13, 14, 15, 16, 17, 18, 3], [2, 3]]
LONGEST = 128


@pytest.fixture(params=[300, 70_000], ids=["two bytes", "four bytes"])
def made(request):
    top = request.param - 1
    return tokens.ragged([*ROWS, [2, top, 3]], np.array([1, 0, 2, 1]), request.param)


def feed_of(rows, packed, vocab_size=300):
    return Feed(tokens.ragged(rows, np.arange(len(rows)) % 2, vocab_size), CPU, 0, packed)


@pytest.mark.parametrize("pad_id", [0, 99])
def test_a_padded_batch_is_padded_at_the_end_and_masked_there(made, pad_id):
    inputs, labels = Feed(made, CPU, pad_id).batch(np.array([2, 0, 1, 3]))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 10)
    ids = [row.tolist() for row in np.split(made.input_ids, made.offsets[1:-1])]
    for index, row in enumerate((2, 0, 1, 3)):
        length = len(ids[row])
        assert inputs["input_ids"][index].tolist() == ids[row] + [pad_id] * (10 - length)
        assert inputs["attention_mask"][index].tolist() == [1] * length + [0] * (10 - length)
    assert labels.tolist() == [2, 1, 0, 1]
    assert {inputs["input_ids"].dtype, labels.dtype} == {torch.int64}


def test_a_batch_without_padding_has_no_mask(made):
    inputs, _ = Feed(made, CPU, 0).batch(np.array([0, 3]))
    assert list(inputs) == ["input_ids"]
    assert inputs["input_ids"].shape == (2, 3)


def test_a_packed_batch_is_one_review_behind_the_other_then_padding(made):
    inputs, labels = Feed(made, CPU, 0, packed=True).batch(np.array([2, 0, 3]))
    top = int(made.input_ids[-2])
    assert inputs["input_ids"].tolist() == [2, 3, 2, 7, 3, 2, top, 3] + [0] * 120
    assert inputs["positions"].tolist() == [0, 1, 0, 1, 2, 0, 1, 2] + [0] * 120
    assert inputs["bounds"].tolist() == [0, 2, 5, 8, 128]
    assert inputs["bounds"].dtype == torch.int32
    assert inputs["first"].tolist() == [0, 2, 5]
    assert inputs["longest"] == 128
    assert labels.tolist() == [2, 1, 1]


def test_what_is_said_to_be_computed_is_what_is_made():
    rng = np.random.default_rng(0)
    rows = [[2] * length for length in rng.integers(1, 100, 40)]
    for packed in (False, True):
        feed = feed_of(rows, packed)
        chosen = rng.choice(40, 17, replace=False)
        assert feed.computed(chosen) == feed.batch(chosen).inputs["input_ids"].numel()


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(
        BertConfig(vocab_size=300, max_position_embeddings=LONGEST, num_labels=3, **sizes)
    ).eval()


@pytest.mark.parametrize("lengths", [[1], [LONGEST], [1, LONGEST, 2, 64], "random", "random, another time"])
def test_a_packed_forward_equals_the_padded_one(bert, lengths):
    rng = np.random.default_rng(len(lengths))
    chosen = rng.integers(1, LONGEST + 1, 30) if isinstance(lengths, str) else lengths
    rows = [rng.integers(5, 300, length) for length in chosen]
    order = rng.permutation(len(rows))
    with torch.inference_mode():
        padded = forward(bert, feed_of(rows, packed=False).batch(order).inputs)
        packed = forward(VarlenBert(bert).eval(), feed_of(rows, packed=True).batch(order).inputs)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


def test_a_packed_step_has_the_gradients_of_the_padded_one(bert):
    rng = np.random.default_rng(3)
    rows = [rng.integers(5, 300, length) for length in (3, 50, 1, 128, 20)]
    found = []
    for module, packed in ((bert, False), (VarlenBert(bert).eval(), True)):
        bert.zero_grad()
        batch = feed_of(rows, packed).batch(np.arange(5))
        torch.nn.functional.cross_entropy(forward(module, batch.inputs), batch.labels).backward()
        found.append({name: parameter.grad.clone() for name, parameter in bert.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_layer_computed_for_some_tokens_is_what_it_is_computed_for_all(bert, packed):
    rng = np.random.default_rng(7)
    rows = [rng.integers(5, 300, length) for length in (3, 50, 1, 128, 20)]
    module = (VarlenBert if packed else PaddedBert)(bert).eval()
    layout = module.layout(**feed_of(rows, packed).batch(np.arange(5)).inputs)
    some = torch.cat([layout.first, layout.first[[1, 3, 4]] + torch.tensor([49, 60, 2])])
    with torch.inference_mode():
        whole = module.encode(layout)
        torch.testing.assert_close(module.encode(layout, some), whole[some], atol=1e-5, rtol=1e-5)
        first = module.encode(layout, layout.first, layout.attend_first)
    torch.testing.assert_close(first, whole[layout.first], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", [None, 6])
def test_the_operations_of_a_step_are_those_that_torch_counts(bert, wanted):
    """A backward pass has twice the operations of the forward pass."""
    rows = [np.arange(5, 25) for _ in range(6)]
    inputs = feed_of(rows, packed=False).batch(np.arange(6)).inputs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if wanted:
            PaddedBert(bert).eval()(**inputs)
        else:
            module = PaddedBert(bert).eval()
            hidden = module.encode(module.layout(**inputs))
            module.classifier(module.bert.pooler.dense(hidden))
    assert step_flops(bert, np.full(6, 20), wanted) == pytest.approx(3 * counter.get_total_flops())


class LeavesGarbage(torch.autograd.Function):
    """The values; where nothing used them, their gradient is what lay in memory."""

    @staticmethod
    def forward(context, values, used):
        context.used = used
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.clone()
        gradient[context.used :] = float("nan")
        return gradient, None


def attention_like_the_kernel(query, key, value, asking, bounds, most, longest):
    assert asking.dtype == bounds.dtype == torch.int32
    assert len(asking) == len(bounds)
    assert asking.diff().max() <= most
    assert bounds.diff().max() <= longest
    key, value = (LeavesGarbage.apply(each, int(bounds[-1])) for each in (key, value))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (query[a:b], key[c:d], value[c:d])))
        for a, b, c, d in zip(asking, asking[1:], bounds, bounds[1:], strict=False)
        if b > a
    ]
    return torch.cat(parts, 1).transpose(0, 1)


def test_what_is_asked_of_the_kernel_for_packed_attention_gives_the_logits_and_the_gradients(bert, monkeypatch):
    rng = np.random.default_rng(3)
    rows = [rng.integers(5, 300, length) for length in (3, 50, 1, 128, 20)]
    batch = feed_of(rows, packed=True).batch(np.arange(5))
    inputs = batch.inputs
    ids, positions = (torch.nn.functional.pad(inputs[name], (0, 6)) for name in ("input_ids", "positions"))
    bounds = torch.cat([inputs["bounds"][:-1], inputs["bounds"][-1:] + 6])
    monkeypatch.setattr("sentiment.bert.varlen_attn", attention_like_the_kernel)
    module = VarlenBert(bert).eval()
    layout = Layout(ids, positions, inputs["first"], varlen(bounds, 128), varlen_first(bounds, 128, len(ids)))
    found = []
    for logits in (module.logits(layout), module(**inputs)):
        bert.zero_grad()
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        found.append({name: parameter.grad.clone() for name, parameter in bert.named_parameters()} | {"logits": logits.detach()})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-5, rtol=1e-4)


def test_dropout_in_training_falls_on_the_packed_modules_too(bert):
    module = VarlenBert(bert).train()
    inputs = feed_of(ROWS, packed=True).batch(np.arange(3)).inputs
    torch.manual_seed(0)
    assert not torch.equal(module(**inputs), module(**inputs))
    module.eval()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for packed attention is CUDA's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_a_packed_forward_is_as_close_to_float64_as_a_padded_one(bert, dtype):
    rng = np.random.default_rng(5)
    rows = [rng.integers(5, 300, length) for length in [1, LONGEST, *rng.integers(1, LONGEST + 1, 60)]]
    made, device, order = tokens.ragged(rows, np.zeros(len(rows)), 300), torch.device("cuda"), np.arange(len(rows))
    with torch.inference_mode():
        exact = forward(bert.double(), feed_of(rows, packed=False).batch(order).inputs)
        model = bert.float().to(device)
        with torch.autocast("cuda", dtype):
            padded, packed = (
                forward(module, Feed(made, device, 0, is_packed).batch(order).inputs).double().cpu()
                for module, is_packed in ((model, False), (VarlenBert(model).eval(), True))
            )
    bert.cpu()
    assert (packed - exact).abs().max() < 2 * (padded - exact).abs().max() + 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for packed attention is CUDA's")
def test_on_cuda_a_packed_step_has_gradients_as_close_to_float64_as_a_padded_one(bert):
    rng = np.random.default_rng(6)
    rows = [rng.integers(5, 300, length) for length in [1, LONGEST, *rng.integers(1, LONGEST + 1, 61)]]
    made, device, order = tokens.ragged(rows, np.arange(len(rows)) % 3, 300), torch.device("cuda"), np.arange(len(rows))

    def gradients(module, feed):
        bert.zero_grad()
        batch = feed.batch(order)
        torch.nn.functional.cross_entropy(forward(module, batch.inputs).float(), batch.labels).backward()
        return {name: parameter.grad.double().cpu().clone() for name, parameter in bert.named_parameters()}  # .to moves it, too

    exact = gradients(bert.double(), Feed(made, CPU, 0, False))
    model = bert.float().to(device)
    torch.full((1 << 24,), float("nan"), device=device)  # what the kernel leaves as it finds it shows
    with torch.autocast("cuda", torch.bfloat16):
        padded, packed = (
            gradients(module, Feed(made, device, 0, is_packed))
            for module, is_packed in ((model, False), (VarlenBert(model).eval(), True))
        )
    bert.cpu()
    for name, gradient in exact.items():
        error = (padded[name] - gradient).abs().max()
        assert (packed[name] - gradient).abs().max() < 3 * error + 1e-3 * gradient.abs().max() + 1e-6, name


def test_dropout_on_a_cpu_drops_the_share_scales_the_rest_and_gives_the_gradient_of_what_stayed():
    torch.manual_seed(0)
    values = torch.rand(1000, 1001) + 1
    values.requires_grad_()
    dropped = CpuDropout.apply(values, 0.1)
    fell = dropped == 0
    assert fell.float().mean().item() == pytest.approx(0.1, abs=0.001)
    torch.testing.assert_close(dropped[~fell], values[~fell] / 0.9)
    columns = fell.float().mean(0)
    assert columns.std().item() == pytest.approx((0.1 * 0.9 / 1000) ** 0.5, rel=0.1)
    pairs = (fell[:, 1:] & fell[:, :-1]).float().mean().item()
    assert pairs == pytest.approx(0.01, abs=0.0005)
    dropped.sum().backward()
    torch.testing.assert_close(values.grad, (~fell) / 0.9)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_plain_products_is_torchs_own(masked):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 16)
    mask = (torch.arange(7) < 5)[None, None, None] if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(small_attention(query, key, value, mask), expected)


def test_what_is_no_bert_is_computed_by_its_own_forward():
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=300, **sizes)).eval()
    assert reader(model, packed=False) is model
    assert forward(model, feed_of(ROWS, packed=False).batch(np.arange(3)).inputs).shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12), ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA L40", None),
        ("NVIDIA T400 4GB", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_card_itself_and_not_of_one_of_a_like_name(monkeypatch, name, half):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), "bf16") == half
