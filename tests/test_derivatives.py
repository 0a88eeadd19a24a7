"""Forward mode, vmap and gradients of gradients through every attention kernel and the whole network, against float64."""

import copy
import functools

import pytest
import torch
from conftest import randomize, relative_error
from torch.autograd import forward_ad

from diffusers_hdit import HDiTModel, ops
from diffusers_hdit.ops import cosine_neighborhood_attention, neighborhood_attention
from diffusers_hdit.ops.kernels import cpp_attention_problem


WITH_ALL = ("auto", "tiled", "dense")
SHAPE = (1, 9, 8, 2, 16)
ANGLES = torch.rand(9, 8, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def plain(backend, query, key, value):
    return neighborhood_attention(query, key, value, (5, 3), backend=backend)


def cosine(backend, query, key, value):
    scale = torch.tensor([4.0, 9.0], dtype=query.dtype)
    tables = ANGLES.cos().to(query.dtype), ANGLES.sin().to(query.dtype)
    return cosine_neighborhood_attention(query, key, value, (5, 3), scale, tables, backend)


each = pytest.mark.parametrize("attend", [plain, cosine])


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def directional(function, at, h=1e-5):
    """Central differences in float64 along the cosine of each input."""
    forward, backward = ([x.double() + sign * h * x.double().cos() for x in at] for sign in (1, -1))
    return (function(*forward) - function(*backward)) / (2 * h)


@each
@pytest.mark.parametrize("backend", WITH_ALL)
def test_forward_mode(attend, backend, inputs):
    expected = directional(functools.partial(attend, "dense"), inputs)
    along = tuple(x.cos() for x in inputs)
    function = functools.partial(attend, backend)
    assert relative_error(torch.func.jvp(function, tuple(inputs), along)[1], expected) < 1e-4
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, t) for x, t in zip(inputs, along, strict=True)]
        assert relative_error(forward_ad.unpack_dual(function(*dual)).tangent, expected) < 1e-4


@each
@pytest.mark.parametrize("backend", WITH_ALL)
def test_vmap_and_gradients_of_each_sample(attend, backend, inputs):
    function = functools.partial(attend, backend)
    several = [torch.stack((x, x.flip(1), 2 * x)) for x in inputs]
    found = torch.vmap(function)(*several)
    grad = torch.func.grad(lambda *x: function(*x).sin().sum(), (0, 1, 2))
    gradients = torch.vmap(grad)(*several)
    for i in range(3):
        one = [x[i].double().requires_grad_() for x in several]
        expected = attend("dense", *one)
        assert relative_error(found[i], expected) < 1e-5
        for by_vmap, exact in zip(gradients, torch.autograd.grad(expected.sin().sum(), one), strict=True):
            assert relative_error(by_vmap[i], exact) < 1e-5


@each
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_gradients_of_gradients(attend, backend, inputs):
    """C++ has no rule for them; PyTorch takes over in the first backward pass."""
    if problem := cpp_attention_problem("cpu", torch.float32, 16):
        pytest.skip(problem)
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]

    def second(function, at):
        first = torch.autograd.grad(function(*at).sin().sum(), at, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), at)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = second(functools.partial(attend, "dense"), exact)
    for found, right in zip(second(functools.partial(attend, backend), inputs), expected, strict=True):
        assert relative_error(found, right) < 1e-5


@pytest.mark.parametrize("backend", ["cpp", "triton", "flex", "natten"])
def test_a_named_kernel_refuses(backend, inputs):
    """It would return tangents of zero, or fail deep inside."""
    function = functools.partial(plain, backend)
    for transform in (
        lambda: torch.func.jvp(function, tuple(inputs), tuple(inputs)),
        lambda: torch.vmap(function)(*(x[None] for x in inputs)),
    ):
        with pytest.raises(ValueError, match=r"no rules for torch.func .*'tiled'"):
            transform()
    # Outside of transforms nothing changes.
    assert torch.isfinite(plain("auto", *inputs)).all()


def network():
    model = HDiTModel(
        sample_size=16,
        patch_size=2,
        widths=(32, 48),
        depths=(1, 1),
        attention_head_dim=16,
        kernel_size=3,
        mapping_width=32,
        num_classes=3,
    )
    return randomize(model).eval()


def test_forward_mode_of_a_network():
    """Over image and time, as consistency and mean-flow training need it."""
    model = network()
    exact = copy.deepcopy(model).double()
    sample, time = torch.randn(2, 3, 16, 16), torch.tensor([0.3, -0.7])
    labels = torch.tensor([0, 2])

    def run(network):
        return lambda sample, time: network(sample, time, labels, return_dict=False)[0]

    expected = directional(run(exact), (sample, time))
    found = torch.func.jvp(run(model), (sample, time), (sample.cos(), time.cos()))[1]
    assert relative_error(found, expected) < 1e-4
    with ops.reference():
        by_reference = torch.func.jvp(run(model), (sample, time), (sample.cos(), time.cos()))[1]
    assert relative_error(by_reference, expected) < 1e-4


def test_gradients_of_each_sample_of_a_network():
    """With class labels, which are looked at elsewhere."""
    model = network()
    parameters = dict(model.named_parameters())
    sample, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])

    def loss(parameters, sample, label):
        out = torch.func.functional_call(model, parameters, (sample[None], 0.3, label[None]))
        return out.sample.square().mean()

    found = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, sample, labels)
    for i in range(2):
        expected = torch.autograd.grad(loss(parameters, sample[i], labels[i]), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            assert (found[name][i] - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max()), name
