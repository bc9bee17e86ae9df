"""Products by oneDNN: the same numbers as PyTorch's own, forwards and backwards."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu

from tandem import device
from tandem.device import wide_vectors
from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.engine.random import key
from tandem.model import product as products
from tandem.model import token_logprobs
from tandem.model.product import Linear, added, gated, product, quicken
from tiny_models import FAMILIES, language_model

pytestmark = pytest.mark.skipif(not wide_vectors(), reason="this CPU has no AVX-512")

SHAPES = [(64, 256, 512), (700, 192, 96), (700, 96, 192), (513, 128, 128)]


def exact(x, weight, bias=None):
    return linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def on_every_maker(monkeypatch):
    """Also where PyTorch's own products are as good."""
    monkeypatch.setattr(products, "idle_vectors", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the products that oneDNN made."""
    made, onednn = [], products._onednn

    def counted(x, weight_OI, bias_O=None):
        made.append((*x.shape, len(weight_OI)))
        return onednn(x, weight_OI, bias_O)

    monkeypatch.setattr(products, "_onednn", counted)
    return made


@pytest.mark.parametrize("rows, width, out", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_product_and_its_gradients_are_those_of_linear(rows, width, out, biased, calls):
    x = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(out, width, requires_grad=True)
    bias = torch.randn(out, requires_grad=True) if biased else None
    upstream = torch.randn(rows, out)
    inputs = [t for t in (x, weight, bias) if t is not None]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    result = product(x, weight, bias)
    expected = linear(*doubles)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(result, inputs, upstream),
        torch.autograd.grad(expected, doubles, upstream.double()),
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=5e-4)
    assert len(calls) == 3


def test_rows_may_lie_in_more_than_one_dimension(calls):
    x, weight = torch.randn(2, 350, 96, requires_grad=True), torch.randn(192, 96)
    result = product(x, weight)
    assert result.shape == (2, 350, 192)
    torch.testing.assert_close(result.double(), exact(x, weight), rtol=1e-5, atol=1e-4)
    (dx,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-4)
    assert len(calls) == 2, "a frozen weight costs no product"


def test_small_products_and_other_types_stay_with_pytorch(calls):
    product(torch.randn(4, 64), torch.randn(64, 64))
    product(torch.randn(700, 192).bfloat16(), torch.randn(96, 192).bfloat16())
    product(torch.randn(700, 192).double(), torch.randn(96, 192).double())
    assert not calls


@pytest.mark.parametrize("rows", [3, 900])
def test_operations_joined_with_a_product(rows):
    x, gate, up = torch.randn(rows, 128), torch.randn(192, 128) / 8, torch.randn(192, 128)
    back, residual = torch.randn(128, 192), torch.randn(rows, 128)
    kept = residual.clone()
    inner = silu(exact(x, gate)) * exact(x, up)
    torch.testing.assert_close(gated(x, gate, up).double(), inner, rtol=1e-5, atol=1e-4)
    summed = added(residual, inner.float(), back)
    torch.testing.assert_close(summed.double(), kept + exact(inner, back), rtol=1e-5, atol=1e-3)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize(("maker", "idle"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_vectors_that_pytorch_uses_itself_are_left_to_it(maker, idle, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(device, "CPUS", tmp_path / "cpuinfo")
    assert device.idle_vectors.__wrapped__() == idle


def test_plain_layers_are_quickened_and_others_left_alone():
    model = language_model()
    linears = [m for m in model.network.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 * 7 + 1
    assert {type(m) for m in linears} == {Linear} == {type(m) for m in copy.deepcopy(linears)}
    other = type("Other", (nn.Linear,), {})(4, 4)
    quicken(other)
    assert type(other).__name__ == "Other"


def loss_and_gradient(model):
    length_B = torch.tensor([40, 31, 40, 23])
    tokens_BT = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(1))
    column_T = torch.arange(40)
    mask_BT = (column_T >= 9) & (column_T < length_B[:, None])
    logp_BT, _ = token_logprobs(model, tokens_BT, mask_BT, length_B, temperature=1.0, logits_bytes=2**30)
    loss = -logp_BT.sum() / mask_BT.sum()
    names, parameters = zip(*model.network.named_parameters())
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_of_a_model(family, monkeypatch, calls):
    model = language_model(family)
    monkeypatch.setattr(products, "LEAST", 2**62)
    loss, gradients = loss_and_gradient(model)
    assert not calls
    monkeypatch.setattr(products, "LEAST", 0)
    quick_loss, quick_gradients = loss_and_gradient(model)
    assert len(calls) == 3 * (2 * 7 + 1)
    torch.testing.assert_close(quick_loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(quick_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["qwen2_grouped", "llama"])
def test_answers_of_the_engine(family, monkeypatch):
    model = language_model(family)
    requests = [Request(tokens=tuple(range(5, 12 + i)), key=key(7, i, k)) for i in range(3) for k in range(2)]
    completions = []
    for least in (2**62, 0):
        monkeypatch.setattr(products, "LEAST", least)
        completions.append(EmbeddedEngine(model, 4).generate(requests, SamplingParams(max_tokens=12)))
    plain, quick = completions
    assert [c.tokens for c in plain] == [c.tokens for c in quick]
    for ours, theirs in zip(quick, plain):
        assert ours.logp == pytest.approx(theirs.logp, abs=1e-5)
