"""Norms, GEGLU, queries and keys in one pass: against the textbook's formulas in float64, and whatever PyTorch may ask of them."""

import copy
import math

import pytest
import torch
from conftest import kept_bytes, randomize, relative_error
from test_neighborhood import skip_without
from torch.autograd import forward_ad

from diffusers_hdit import ops
from diffusers_hdit.ops.cpu import fused as fused_cpp
from diffusers_hdit.ops.cpu import library as cpp_kernels
from diffusers_hdit.ops.geglu import geglu_reference
from diffusers_hdit.ops.registry import reference
from diffusers_hdit.ops.rotary import normalize_and_rotate


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # roundings of results, and of sums over 270 tokens


@pytest.fixture(autouse=True)
def kernels():
    skip_without("cpp")


def norm_by_the_book(x, scale):
    scale = scale if scale.dim() == 1 else scale[:, None, None]
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def one_scale(x, scale):
    return ops.rms_norm(x, scale)


def geglu_by_the_book(hidden):
    value, gate = hidden.split(hidden.shape[-1] // 2, -1)
    return value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2


ANGLES = 3 * torch.randn(5, 27, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rotated(x, scale):
    return normalize_and_rotate(x, scale, [table.float().to(x.device) for table in (ANGLES.cos(), ANGLES.sin())])


def rotated_by_the_book(x, scale):
    first, second, rest = normalized_by_the_book(x, scale).split([4, 4, x.shape[-1] - 8], -1)
    found = torch.complex(first, second) * torch.polar(torch.ones_like(ANGLES), ANGLES)
    return torch.cat((found.real, found.imag, rest), -1)


def normalized(x, scale):
    return normalize_and_rotate(x, scale, None)


def normalized_by_the_book(x, scale):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() * scale.sqrt()[:, None]


def inputs_of(function, width, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    if function is ops.geglu:
        return ((3 * random(batch, 5, 27, 2 * width)).detach().requires_grad_(),)
    if function in (rotated, normalized):
        return random(batch, 5, 27, 3, width), (random(3).detach().abs() + 1).requires_grad_()
    return random(batch, 5, 27, width), random(width) if function is one_scale else random(batch, width)


FUNCTIONS = {
    ops.rms_norm: norm_by_the_book,
    one_scale: norm_by_the_book,
    ops.geglu: geglu_by_the_book,
    rotated: rotated_by_the_book,
    normalized: normalized_by_the_book,
}
each = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def value_and_gradients(function, inputs):
    out = function(*inputs)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).sin().view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, weights.to(out.dtype))]


def check(function, inputs, tolerance):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for found, expected in zip(
        value_and_gradients(function, inputs), value_and_gradients(FUNCTIONS[function], exact), strict=True
    ):
        assert found.dtype == inputs[0].dtype and relative_error(found, expected) < tolerance


def ran_kernels(function, inputs):
    return type(function(*inputs).grad_fn).__name__ in (
        "RMSNormBackward",
        "GEGLUBackward",
        "NormalizeAndRotateBackward",
    )


@each
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [8, 24, 128, 200])  # less than a vector, with a rest, and without
def test_against_float64(function, dtype, width):
    inputs = inputs_of(function, width, dtype)
    assert ran_kernels(function, inputs)
    check(function, inputs, TOLERANCE[dtype])


@pytest.mark.slow
@each
def test_processors_without_avx512(function, no_kernels_yet, monkeypatch):
    monkeypatch.setattr(cpp_kernels, "_FLAGS", [flag for flag in cpp_kernels._FLAGS if flag != "-march=native"])
    check(function, inputs_of(function, 36), TOLERANCE[torch.float32])
    check(function, inputs_of(function, 36, torch.bfloat16), TOLERANCE[torch.bfloat16])


@each
def test_any_strides(function):
    inputs = inputs_of(function, 24)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    for found, expected in zip(
        value_and_gradients(function, strided), value_and_gradients(function, inputs), strict=True
    ):
        assert torch.equal(found, expected)
    out = function(*inputs)
    same = torch.ones(()).expand(out.shape)  # as a sum hands it back: all of it is one number
    for found, expected in zip(
        torch.autograd.grad(function(*inputs), inputs, same),
        torch.autograd.grad(out, inputs, same.contiguous()),
        strict=True,
    ):
        assert torch.equal(found, expected)


@each
def test_neither_threads_nor_the_batch_change_a_bit(function):
    inputs = [x.detach().requires_grad_() for x in inputs_of(function, 600, batch=3)]
    before, results = torch.get_num_threads(), []

    def all_of(inputs):
        out = function(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(all_of(inputs))
        alone = all_of([(x[1:2] if x.dim() > 1 else x).detach().requires_grad_() for x in inputs])
    finally:
        torch.set_num_threads(before)
    for one, two, single in zip(*results, alone, strict=True):
        assert torch.equal(one, two) and (one.dim() == 1 or torch.equal(one[1:2], single))


def test_gates_far_out():
    gates = torch.tensor([-1e30, -100.0, -14.0, -13.0, -5.0, -0.0, 0.0, 1e-30, 5.0, 13.0, 14.0, 100.0, 1e30])
    hidden = torch.cat((torch.ones_like(gates), gates)).requires_grad_()
    check(ops.geglu, [hidden], TOLERANCE[torch.float32])
    out = ops.geglu(hidden)
    assert out[:3].abs().max() < 1e-30 and torch.equal(out[-3:], gates[-3:])


@each
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_not_finite_stays_so(function, number, dtype):
    """A step with such numbers is left out of a training, which has to see them."""
    inputs = inputs_of(function, 24, dtype)
    with torch.no_grad():
        inputs[0][0, 3, 4].view(-1)[30 if function is ops.geglu else 5] = number
    out, gradient, *_ = value_and_gradients(function, inputs)
    bad = torch.zeros(2, 5, 27, dtype=torch.bool)
    bad[0, 3, 4] = True
    for found in (out, gradient):
        assert torch.equal(~found.flatten(3).isfinite().all(-1), bad)


@each
def test_nothing_in_it(function):
    inputs = [(x[:0] if x.dim() > 1 else x).detach().requires_grad_() for x in inputs_of(function, 24)]
    out, *gradients = value_and_gradients(function, inputs)
    assert out.shape[:3] == (0, 5, 27) and all(gradient.abs().sum() == 0 for gradient in gradients)


@each
def test_second_derivatives(function):
    inputs = inputs_of(function, 24)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = (
        torch.autograd.grad(
            sum(x.square().sum() for x in torch.autograd.grad(f(*at).sin().sum(), at, create_graph=True)), at
        )
        for f, at in ((function, inputs), (FUNCTIONS[function], exact))
    )
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 1e-5


def directional(function, at, count):
    """The derivative with respect to the first `count` inputs along their cosines."""
    some = tuple(at[:count])
    return torch.func.jvp(lambda *x: function(*x, *at[count:]), some, tuple(x.cos() for x in some))[1]


@each
@pytest.mark.parametrize("under", [torch.enable_grad, torch.no_grad])
def test_transforms_of_functions(function, under):
    """A kernel that these do not see would lose what they carry along."""
    inputs = [x.detach() for x in inputs_of(function, 24)]
    exact, by_the_book, every = [x.double() for x in inputs], FUNCTIONS[function], tuple(range(len(inputs)))
    with under():
        for count in (1, len(inputs)):
            expected = directional(by_the_book, exact, count)
            assert relative_error(directional(function, inputs, count), expected) < 1e-6
            with forward_ad.dual_level():
                dual = [forward_ad.make_dual(x, x.cos()) for x in inputs[:count]]
                found = forward_ad.unpack_dual(function(*dual, *inputs[count:])).tangent
            assert relative_error(found, expected) < 1e-6

        batched = torch.vmap(function)(*(x.expand(3, *x.shape) for x in inputs))
        assert batched.shape == (3, *by_the_book(*exact).shape)
        assert relative_error(batched[2], by_the_book(*exact)) < TOLERANCE[torch.float32]

        gradient, exact_gradient = (
            torch.func.grad(lambda *x, f=f: f(*x).sin().sum(), every) for f in (function, by_the_book)
        )
        for found, expected in zip(gradient(*inputs), exact_gradient(*exact), strict=True):
            assert relative_error(found, expected) < 1e-6
        forward_over_reverse = directional(lambda *x: gradient(*x)[0], inputs, 1)
        assert relative_error(forward_over_reverse, directional(lambda *x: exact_gradient(*x)[0], exact, 1)) < 3e-6


def test_operators_are_registered_right():
    """Fake results and tracing, as PyTorch's own checks want them."""
    x, scale = (x.detach() for x in inputs_of(ops.rms_norm, 24))
    (hidden,) = (x.detach() for x in inputs_of(ops.geglu, 24))
    heads = [x.detach() for x in inputs_of(rotated, 24)] + [ANGLES.cos().float(), ANGLES.sin().float()]
    for operator, inputs in (
        (fused_cpp.norm_kernel, (x, scale)),
        (fused_cpp.norm_gradients, (x + 1, x, scale)),
        (fused_cpp.geglu_kernel, (hidden,)),
        (fused_cpp.geglu_gradient, (x, hidden)),
        (fused_cpp.rotate_kernel, heads),
        (fused_cpp.rotate_gradients, (heads[0] + 1, *heads)),
    ):
        torch.library.opcheck(operator, inputs)


@each
def test_compiled_networks_have_the_references(function):
    """The compiler makes one pass of them and of what is around them."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    inputs = inputs_of(function, 24)
    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    assert len(graphs) == 1 and "diffusers_hdit" not in graphs[0]


@each
def test_where_there_is_no_kernel(function):
    for dtype in (torch.float64, torch.float16):
        inputs = inputs_of(function, 24, dtype)
        assert not ran_kernels(function, inputs) and function(*inputs).dtype == dtype
    meta = [x.detach().to("meta") for x in inputs_of(function, 24)]
    assert function(*meta).shape == function(*inputs).shape


def test_scales_of_another_type():
    """As autocast makes them; where the result's type is not that of the tokens, the reference decides on it."""
    x, scale = inputs_of(ops.rms_norm, 24)
    half = scale.detach().bfloat16().requires_grad_()
    assert ran_kernels(ops.rms_norm, (x, half))
    out, _, of_scale = value_and_gradients(ops.rms_norm, (x, half))
    assert out.dtype == torch.float32 and of_scale.dtype == torch.bfloat16
    assert relative_error(out, norm_by_the_book(x.double(), half.double())) < TOLERANCE[torch.float32]
    assert ops.rms_norm(x.detach().bfloat16(), scale).dtype == torch.float32


def test_angles_that_need_gradients():
    x, scale = inputs_of(rotated, 24)
    tables = [table.float().requires_grad_() for table in (ANGLES.cos(), ANGLES.sin())]
    found = torch.autograd.grad(normalize_and_rotate(x, scale, tables).sum(), tables)
    exact = [table.detach().double().requires_grad_() for table in tables]
    expected = torch.autograd.grad(normalize_and_rotate(x.double(), scale.double(), exact).sum(), exact)
    assert all(relative_error(a, b) < TOLERANCE[torch.float32] for a, b in zip(found, expected, strict=True))


def test_without_a_compiler(no_kernels_yet, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    inputs = inputs_of(ops.geglu, 24)
    assert not ran_kernels(ops.geglu, inputs)
    assert torch.equal(ops.geglu(*inputs), geglu_reference(*inputs))


@pytest.mark.parametrize("autocast", [False, True])
def test_whole_networks(make_model, autocast):
    """As far from float64 as the references are."""
    model = randomize(make_model())
    sample, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 2.0])

    def run(model, autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(sample.to(model.dtype), sigma).sample
        parameters = [x for x in model.parameters() if x.requires_grad]
        return [out, *torch.autograd.grad(out.square().mean(), parameters)]

    by_kernels, exact = run(model, autocast), run(copy.deepcopy(model).double())
    with reference():
        by_reference = run(model, autocast)
    assert any(not torch.equal(x, y) for x, y in zip(by_kernels, by_reference, strict=True))
    errors = [
        [relative_error(x, y) for x, y in zip(found, exact, strict=True)] for found in (by_kernels, by_reference)
    ]
    assert sum(errors[0]) < 1.3 * sum(errors[1])
    assert all(x.dtype == y.dtype for x, y in zip(by_kernels, by_reference, strict=True))


def test_less_is_kept_for_the_backward_pass(make_model):
    model = make_model().bfloat16()
    with reference():
        before = kept_bytes(model)
    assert kept_bytes(model) < 0.85 * before
