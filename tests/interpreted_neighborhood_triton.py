"""Triton's kernels as NumPy runs them. `test_neighborhood_triton.py` starts this with TRITON_INTERPRET=1 set."""

import dataclasses

import pytest
import torch
from test_neighborhood import TOLERANCE, check_cosine_attention, cosine_inputs, reference, relative_error, tensors

from diffusers_hdit.ops import kernels
from diffusers_hdit.ops.neighborhood_attention import neighborhood_attention, unavailable_reason
from diffusers_hdit.ops.triton import neighborhood_attention as neighborhood_triton


pytestmark = pytest.mark.skipif(not neighborhood_triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")

# As there; besides, the interpreter cuts numbers off where the GPU rounds to bfloat16: twice the unit.
TOLERANCE = {**TOLERANCE, torch.float16: 1.5e-3, torch.bfloat16: 2 * TOLERANCE[torch.bfloat16]}

CASES = [  # batch, h, w, heads, channels, kernel
    pytest.param(1, 16, 24, 1, 64, 7, id="whole-tiles"),
    pytest.param(2, 13, 10, 2, 16, 7, id="odd-sizes-batch-heads"),
    pytest.param(1, 7, 9, 1, 16, 7, id="kernel-spans-rows"),
    pytest.param(1, 3, 4, 1, 16, 3, id="smallest"),
    pytest.param(1, 22, 22, 1, 32, 7, id="last-keys-seen-from-17-columns"),
    pytest.param(1, 9, 23, 1, 128, (3, 11), id="nonsquare-kernel"),
    pytest.param(1, 18, 17, 1, 16, (17, 9), id="kernel-beyond-the-tile"),
    pytest.param(1, 8, 9, 1, 16, 1, id="kernel-of-one"),
]


# The interpreter takes milliseconds for what a GPU does in nanoseconds: halves where the loops differ.
HALVES = [(*CASES[i].values, dtype) for i in (0, 1, 5) for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("b, h, w, n, d, kernel_size, dtype", HALVES)
def test_values_and_gradients_in_half_precision(b, h, w, n, d, kernel_size, dtype):
    test_values_and_gradients(b, h, w, n, d, kernel_size, dtype)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("b, h, w, n, d, kernel_size", CASES)
def test_values_and_gradients(b, h, w, n, d, kernel_size, dtype):
    inputs = tensors(b, h, w, n, d, dtype=dtype, requires_grad=True)
    (weight,) = tensors(b, h, w, n, d, dtype=dtype, count=1)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact, kernel_size, scale=0.7)
    expected_grads = torch.autograd.grad(expected, exact, weight.double())

    out = neighborhood_attention(*inputs, kernel_size, scale=0.7, backend="triton")
    assert out.shape == (b, h, w, n, d) and out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    # NumPy's products of 128 channels are rounded by the processor's kernels: never worse than PyTorch's in float32.
    plain = [x.detach().float().requires_grad_() for x in inputs]
    dense = neighborhood_attention(*plain, kernel_size, scale=0.7, backend="dense")
    dense_grads = torch.autograd.grad(dense, plain, weight.float())
    grads = torch.autograd.grad(out, inputs, weight)
    for found, grad, by_dense in zip(grads, expected_grads, dense_grads, strict=True):
        if grad.norm() == 0:  # a window of one key: its weight is 1 whatever the query and key
            assert found.abs().max() <= TOLERANCE[dtype] * d
        else:
            assert relative_error(found, grad) < max(TOLERANCE[dtype], relative_error(by_dense, grad))


@pytest.mark.parametrize(
    "b, h, w, n, d, pairs, kernel_size",
    [
        pytest.param(2, 13, 10, 2, 16, 4, 5, id="odd-sizes-batch-heads"),
        pytest.param(1, 16, 17, 1, 64, 16, 7, id="the-model's"),
        pytest.param(1, 9, 10, 2, 16, 0, (3, 5), id="no-rotation"),
        pytest.param(1, 9, 10, 1, 32, 5, 3, id="pairs-filled-up"),
        pytest.param(1, 8, 9, 1, 16, 8, 1, id="all-channels-turned-kernel-of-one"),
    ],
)
def test_scaled_and_turned_on_load(b, h, w, n, d, pairs, kernel_size):
    check_cosine_attention("triton", b, h, w, n, d, pairs, kernel_size, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaled_and_turned_in_half_precision(dtype):
    check_cosine_attention("triton", 2, 9, 10, 2, 16, 4, 5, TOLERANCE[dtype], dtype)


def test_large_scores():
    """Weights of one and zero, as of a sharp softmax: exponentials that would overflow without the maximum."""
    inputs = tensors(1, 9, 10, 1, 16, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = neighborhood_attention(*inputs, 5, scale=100.0, backend="triton")
    expected = reference(*exact, 5, scale=100.0)
    # Scores of 1e3 are rounded by 6e-5, and the weights with them.
    assert relative_error(out, expected) < 1e-4
    for found, grad in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    ):
        assert relative_error(found, grad) < 1e-3


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_are_not_positive(scale):
    inputs = tensors(1, 5, 6, 1, 16, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = neighborhood_attention(*inputs, 3, scale=scale, backend="triton")
    expected = reference(*exact, 3, scale=scale)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    pairs = zip(
        *(torch.autograd.grad(o.square().sum(), x) for o, x in ((out, inputs), (expected, exact))), strict=True
    )
    for found, grad in pairs:
        assert (found - grad).norm() <= TOLERANCE[torch.float32] * grad.norm()


@pytest.mark.parametrize("order", ["adjacent", "apart"])
def test_strided_inputs(order):
    """Slices of a packed projection, rows and columns exchanged; channels that are not adjacent are copied."""
    shape = (2, 10, 12, 3, 2, 16) if order == "adjacent" else (2, 10, 12, 3, 16, 2)
    packed = tensors(*shape, count=1)[0].requires_grad_()
    inputs = packed.unbind(3) if order == "adjacent" else [x.transpose(-1, -2) for x in packed.unbind(3)]
    out = neighborhood_attention(*(x.transpose(1, 2) for x in inputs), (5, 3), backend="triton").transpose(1, 2)
    expected = reference(*(x.double() for x in inputs), (3, 5), scale=0.25)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    weight = torch.linspace(-1, 1, out.numel()).view(*out.shape[:3], 16, 2).transpose(-1, -2)
    found, grad = (torch.autograd.grad((o * weight).sum(), packed)[0] for o in (out, expected))
    assert relative_error(found, grad.double()) < TOLERANCE[torch.float32]


def test_same_bits_again_and_under_gradient_checkpointing():
    inputs = tensors(1, 10, 11, 2, 16, requires_grad=True)
    out = neighborhood_attention(*inputs, 5, backend="triton")
    again = torch.utils.checkpoint.checkpoint(
        neighborhood_attention, *inputs, 5, None, "triton", use_reentrant=False
    )  # fmt: skip
    assert torch.equal(out, again)
    for x, y in zip(*(torch.autograd.grad(o.square().sum(), inputs) for o in (out, again)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("pairs", [None, 4])
def test_operators_are_what_they_say(pairs):
    """Shapes without data, gradients and traces, by PyTorch's own check."""
    (*inputs, scale), angles = cosine_inputs(1, 9, 8, 1, 16, pairs)
    inputs += (
        [None] * 3 if pairs is None else [scale.detach().requires_grad_(), angles.cos().float(), angles.sin().float()]
    )
    torch.library.opcheck(neighborhood_triton.attend, (*inputs, 3, 5, 0.5))
    inputs = [x if x is None else x.detach() for x in inputs]
    out, lse = neighborhood_triton.attend(*inputs, 3, 5, 0.5)
    torch.library.opcheck(neighborhood_triton.attend_backward, (out, *inputs, out, lse, 3, 5, 0.5))


@pytest.mark.parametrize("compiler, sizes", [("inductor", [(7, 8)]), ("aot_eager", [(7, 8), (9, 10)])])
def test_compiled_equals_eager(compiler, sizes):
    def step(*inputs):
        return neighborhood_attention(*inputs, 5, backend="triton").square()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    for h, w in sizes:
        inputs = tensors(1, h, w, 1, 16, requires_grad=True)
        out, expected = compiled(*inputs), step(*inputs)
        assert torch.equal(out, expected)
        for x, y in zip(*(torch.autograd.grad(o.sum(), inputs) for o in (out, expected)), strict=True):
            assert relative_error(x, y.double()) < TOLERANCE[torch.float32]


def test_traced_before_any_eager_call(monkeypatch):
    """The trace imports the kernels; and again where the answer is not known yet."""
    monkeypatch.setattr(kernels, "_triton", None)
    torch._dynamo.reset()
    compiled = torch.compile(neighborhood_attention, backend="aot_eager", fullgraph=True)
    inputs = tensors(1, 8, 9, 1, 16)
    expected = reference(*(x.double() for x in inputs), 3, scale=0.25)
    assert relative_error(compiled(*inputs, 3, backend="triton"), expected) < TOLERANCE[torch.float32]


def test_the_model_uses_it(make_model, monkeypatch):
    model = make_model(widths=(32, 64), depths=(1, 1), attention_head_dim=16)
    sample, timestep = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(1)
    grads = {}
    for backend in ("dense", "triton"):
        model.set_neighborhood_backend(backend)
        model.zero_grad()
        model(sample, timestep).sample.square().sum().backward()
        grads[backend] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in grads["dense"].items():
        assert (grads["triton"][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name
    calls = []
    run = lambda *args: calls.append(args) or args[0]  # noqa: E731
    triton = kernels.KERNELS["neighborhood_attention"]["triton"]
    monkeypatch.setitem(kernels.KERNELS["neighborhood_attention"], "triton", dataclasses.replace(triton, run=run))
    model(sample, timestep)
    assert len(calls) == 2  # the level's blocks on the way down and up
    assert all(norm is not None and cos is not None for *_, norm, cos, sin in calls)


def test_may_run_on_the_cpu():
    situation = {"device": "cpu", "dtype": torch.bfloat16, "head_dim": 64, "training": True}
    assert unavailable_reason("triton", **situation) is None
