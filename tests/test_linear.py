"""Linear layers by oneDNN: against float64, whatever PyTorch may ask of them, and when they are taken."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from diffusers_hdit import HDiTModel
from diffusers_hdit.ops.cpu.linear import linear as operator


linear = sys.modules["diffusers_hdit.ops.linear"]  # the package has a function of this name


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Whatever this processor is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch is built without oneDNN.")
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)


# More columns than rows, fewer, and a rest beside vectors. All are large enough.
SHAPES = [((2, 32, 32, 64), 96), ((2, 32, 32, 96), 40), ((3, 41, 27, 37), 61)]


def make_inputs(shape, width):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, shape[-1], generator=generator)
    return torch.randn(shape, generator=generator).requires_grad_(), nn.Parameter(weight)


def layer_of(weight):
    layer = linear.Linear(*reversed(weight.shape))
    layer.weight = weight
    return layer


def ran_onednn(layer, x):
    return "diffusers_hdit" in type(layer(x).grad_fn).__name__


@pytest.mark.parametrize("shape, width", SHAPES)
@pytest.mark.parametrize("reduce", [torch.sum, lambda x: x.sin().sum()], ids=["one gradient for all", "gradients"])
def test_against_float64(shape, width, reduce):
    x, weight = make_inputs(shape, width)
    layer = layer_of(weight)
    assert ran_onednn(layer, x)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.linear(*exact)
    assert relative_error(layer(x), expected) < 1e-6
    found = torch.autograd.grad(reduce(layer(x)), (x, weight))
    for gradient, reference in zip(found, torch.autograd.grad(reduce(expected), exact), strict=True):
        assert gradient.shape == reference.shape and relative_error(gradient, reference) < 2e-6


@pytest.mark.parametrize("shape, width", SHAPES)
def test_any_strides(shape, width):
    x, weight = make_inputs(shape, width)
    strided = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    columns = nn.Parameter(weight.detach().t().contiguous().t())
    found = torch.autograd.grad(layer_of(columns)(strided).square().sum(), (strided, columns))
    for gradient, reference in zip(
        found, torch.autograd.grad(layer_of(weight)(x).square().sum(), (x, weight)), strict=True
    ):
        assert relative_error(gradient, reference) < 1e-6


def test_second_derivatives():
    def penalty(x, weight, layer):
        (gradient,) = torch.autograd.grad(layer(x, weight).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight))

    inputs = make_inputs(*SHAPES[0])
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    for found, expected in zip(penalty(*inputs, operator), penalty(*exact, F.linear), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_no_work_for_what_needs_no_gradient():
    """The frozen layers of a LoRA, and the layer of the patches."""
    for frozen in range(2):
        inputs = make_inputs(*SHAPES[0])
        inputs[frozen].requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            operator(*inputs).sum().backward()
        assert counter.get_total_flops() == 2 * 2 * inputs[0].numel() * len(inputs[1])
        assert inputs[frozen].grad is None and inputs[1 - frozen].grad is not None


def test_as_an_operator():
    for shape, width in SHAPES:
        torch.library.opcheck(operator, make_inputs(shape, width))


def test_torch_func_and_forward_mode():
    x, weight = make_inputs((2, 2, 32, 32, 64), 96)
    layer = layer_of(weight)
    assert ran_onednn(layer, x[0]), "so is what is mapped"

    def loss(function):
        return lambda weight, x: function(x, weight).square().sum()

    def by_layer(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    each = torch.func.vmap(torch.func.grad(loss(by_layer)), (None, 0))(weight.detach(), x.detach())
    (expected,) = torch.autograd.grad(loss(F.linear)(weight, x), weight)
    assert relative_error(each.sum(0), expected) < 1e-6
    _, tangent = torch.func.jvp(layer, (x.detach(),), (x.detach(),))
    assert torch.equal(tangent, F.linear(x, weight))
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x.detach(), x.detach()))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch is built without MKL.")
def test_who_multiplies(monkeypatch):
    monkeypatch.undo()
    for vendor, capability, takes in (
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", "AVX512", True),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False),
        ("vendor_id\t: GenuineIntel\n", "AVX512", False),
    ):
        linear._mkl_is_slow.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(linear, "_vendor", lambda vendor=vendor: vendor)
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            assert linear.onednn_is_faster() == takes, (vendor, capability)
    linear._mkl_is_slow.cache_clear()


def test_left_to_pytorch(monkeypatch):
    x, weight = make_inputs(*SHAPES[0])
    layer = layer_of(weight)
    assert ran_onednn(layer, x) and ran_onednn(layer, x[:1]), "whatever the batch is"
    assert not ran_onednn(layer, x[:, :8]), "too little work"
    assert not ran_onednn(layer.double(), x.double()) and not ran_onednn(layer.bfloat16(), x.bfloat16())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not ran_onednn(layer, x) and layer(x).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not ran_onednn(layer, x)


def test_compiled_once_for_all_batches():
    x, weight = make_inputs(*SHAPES[0])
    layer = layer_of(weight)
    compiled = torch.compile(layer, fullgraph=True)
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    for batch in (2, 3, 4):
        x = torch.randn(batch, *x.shape[1:], requires_grad=True)
        found = torch.autograd.grad(compiled(x).sin().sum(), (x, weight))
        expected = torch.autograd.grad(layer(x).sin().sum(), (x, weight))
        assert torch.equal(compiled(x), layer(x)), "one library"
        for gradient, reference in zip(found, expected, strict=True):
            assert relative_error(gradient, reference) < 1e-6
    assert counters["stats"]["unique_graphs"] == 2, "one for the first batch, one for all"


def test_a_network(monkeypatch):
    config = {"sample_size": 128, "widths": (64, 128), "depths": (1, 1), "attention_head_dim": 32, "mapping_width": 32}
    torch.manual_seed(0)  # of the Fourier features
    model = randomize(HDiTModel(**config))
    sample = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def results():
        out = model(sample, 0.3).sample
        return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(sample, 0.3)
    assert operator.overloadpacket in counter.get_flop_counts()["Global"]
    found = results()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    expected = results()
    for value, reference in zip(found, expected, strict=True):
        # Gradients of attention's scale are small sums of large terms.
        assert relative_error(value, reference) < 1e-4
