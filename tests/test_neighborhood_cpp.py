"""Neighborhood attention in C++: values beyond those of test_neighborhood.py, threads, other processors."""

import pytest
import torch
from conftest import relative_error
from test_neighborhood import TOLERANCE, check_cosine_attention, cosine_inputs, reference, skip_without, tensors

from diffusers_hdit.ops.cpu import library as cpp_kernels
from diffusers_hdit.ops.cpu import neighborhood_attention as neighborhood_cpp
from diffusers_hdit.ops.neighborhood_attention import cosine_neighborhood_attention, neighborhood_attention


@pytest.fixture(autouse=True)
def kernels():
    skip_without("cpp")


def attend_and_gradients(inputs, kernel_size, backend="cpp"):
    out = neighborhood_attention(*inputs, kernel_size, backend=backend)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out) + out.detach())]


@pytest.mark.parametrize("shape, kernel_size", [((1, 40, 70, 2, 48), 7), ((2, 33, 64, 1, 128), (5, 21))])
def test_large_grids(shape, kernel_size):
    """More bands than one, strips inside and at both borders, channels in all groups; against the tiles in float64."""
    inputs = tensors(*shape, requires_grad=True)
    exact = attend_and_gradients([x.detach().double().requires_grad_() for x in inputs], kernel_size, "tiled")
    for found, expected in zip(attend_and_gradients(inputs, kernel_size), exact, strict=True):
        assert relative_error(found, expected) < TOLERANCE[torch.float32]


def test_strided_inputs_and_large_scores():
    (packed,) = tensors(2, 20, 12, 3, 2, 16, count=1)
    packed = (20 * packed).requires_grad_()  # scores of thousands: weights of 0 and 1, nothing that is not finite
    inputs = [x.transpose(1, 2) for x in packed.unbind(3)]
    out = neighborhood_attention(*inputs, (3, 5), scale=1.0, backend="cpp")
    assert relative_error(out, reference(*(x.double() for x in inputs), (3, 5), 1.0)) < TOLERANCE[torch.float32]
    assert torch.autograd.grad(out.sum(), packed)[0].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(scale):
    inputs = tensors(2, 9, 20, 1, 16)
    out = neighborhood_attention(*inputs, (3, 17), scale=scale, backend="cpp")
    assert relative_error(out, reference(*(x.double() for x in inputs), (3, 17), scale)) < TOLERANCE[torch.float32]
    half = [x.half() for x in inputs]
    out = neighborhood_attention(*half, (3, 17), scale=scale, backend="cpp")
    assert relative_error(out, reference(*(x.double() for x in half), (3, 17), scale)) < 1e-3
    assert neighborhood_attention(*(x[:0] for x in inputs), 3, backend="cpp").shape == (0, 9, 20, 1, 16)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_stays_so(which, number):
    """A step with such numbers is left out of a training, which has to see them."""
    inputs = tensors(1, 20, 33, 1, 16)
    inputs[which][0, 9, 17, 0, 3] = number
    inputs = [x.requires_grad_() for x in inputs]
    out, *gradients = attend_and_gradients(inputs, 7)
    near = torch.zeros(20, 33, dtype=torch.bool)
    near[6:13, 14:21] = True  # queries that see the token; besides them, nothing but a neighbour in the same pair
    bad = ~out[0, :, :, 0].isfinite().all(-1)
    # A key that is infinitely far the wrong way has the weight 0.
    expected = near[bad].any() if which == 1 and number == float("inf") else bad[near].all() if which else bad[9, 17]
    assert expected and not bad[:5].any() and not bad[:, :12].any()
    assert not all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_of_strided_tensors():
    (packed,) = tensors(2, 20, 12, 3, 2, 16, count=1)
    packed.requires_grad_()
    found, expected = (
        torch.autograd.grad(attend(packed.to(dtype)).square().sum(), packed)[0]
        for attend, dtype in (
            (
                lambda x: neighborhood_attention(*(y.transpose(1, 2) for y in x.unbind(3)), (3, 5), backend="cpp"),
                torch.float32,
            ),
            (lambda x: reference(*(y.transpose(1, 2) for y in x.unbind(3)), (3, 5), 0.25), torch.float64),
        )
    )
    assert relative_error(found, expected) < TOLERANCE[torch.float32]


def test_neither_threads_nor_the_batch_change_a_bit():
    inputs = tensors(3, 70, 20, 2, 16, requires_grad=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(attend_and_gradients(inputs, 7))
        alone = attend_and_gradients([x.detach()[1:2].requires_grad_() for x in inputs], 7)
    finally:
        torch.set_num_threads(before)
    for one, two, single in zip(*results, alone, strict=True):
        assert torch.equal(one, two) and torch.equal(one[1:2], single)


def test_threads_do_not_change_a_bit_of_what_is_scaled_and_turned():
    inputs, angles = cosine_inputs(3, 70, 20, 2, 16, 4)
    (*qkv, scale), rotary = inputs, (angles.cos().float(), angles.sin().float())
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = cosine_neighborhood_attention(*qkv, 7, scale, rotary, "cpp")
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.slow
def test_processors_without_avx512(no_kernels_yet, monkeypatch):
    """Eight lanes in place of sixteen; where the processor has no AVX-512, the others are tested by nobody."""
    monkeypatch.setattr(cpp_kernels, "_FLAGS", [flag for flag in cpp_kernels._FLAGS if flag != "-march=native"])
    inputs = tensors(1, 20, 27, 2, 32, requires_grad=True)
    exact = attend_and_gradients([x.detach().double().requires_grad_() for x in inputs], 7, "tiled")
    for found, expected in zip(attend_and_gradients(inputs, 7), exact, strict=True):
        assert relative_error(found, expected) < TOLERANCE[torch.float32]
    check_cosine_attention("cpp", 1, 20, 27, 2, 32, 8, 7, 5e-6)
    assert len(list(no_kernels_yet.iterdir())) == 1


def test_operators_are_registered_right():
    """Fake results, gradients and tracing, as PyTorch's own checks want them."""
    (*inputs, scale), angles = cosine_inputs(1, 9, 9, 2, 16, 4)
    for norm, cos, sin in (
        (None, None, None),
        (scale.detach().requires_grad_(), angles.cos().float(), angles.sin().float()),
    ):
        torch.library.opcheck(neighborhood_cpp.attend, (*inputs, norm, cos, sin, 3, 5, 0.3))
    torch._dynamo.reset()

    def step(*inputs):
        return neighborhood_attention(*inputs, 5, scale=0.4, backend="cpp")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for size in (9, 12):
        inputs = tensors(1, size, 9, 1, 16, requires_grad=True)
        assert torch.equal(compiled(*inputs), step(*inputs))
