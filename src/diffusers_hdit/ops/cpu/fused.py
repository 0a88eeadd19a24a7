"""RMSNorm, GEGLU, and the normalizing and rotating of queries and keys on the CPU in C++ (`fused.cpp`), with gradients.

float32 and bfloat16 in memory, float32 inside. Shapes: as in `rms_norm.py`, `geglu.py` and `rotary.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ..derivatives import vjp_of_reference
from ..geglu import geglu_reference
from ..rms_norm import NORM_EPS, rms_norm_reference
from ..rotary import normalize_and_rotate_reference
from .library import call


_BLOCK = 64  # tokens that a thread takes at once, and adds up the gradient of a scale of

_library = torch.library.Library("diffusers_hdit", "FRAGMENT")


# ---- Operators: what a trace of PyTorch's sees ----


def _operator(schema: str, kernel: Callable, fake: Callable) -> Callable:
    name = _library.define(schema)
    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"diffusers_hdit::{name}", fake, lib=_library)
    return getattr(torch.ops.diffusers_hdit, name).default


def _call(function: str, dtype: torch.dtype, *arguments) -> None:
    call(f"{function}_{str(dtype).removeprefix('torch.')}", *arguments)


def _geglu_result(hidden: Tensor) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], hidden.shape[-1] // 2))


def _geglu(hidden: Tensor) -> Tensor:
    hidden, out = hidden.contiguous(), _geglu_result(hidden)
    _call("geglu_forward", hidden.dtype, hidden, out, hidden.shape[:-1].numel(), out.shape[-1])
    return out


def _geglu_gradient(gradient: Tensor, hidden: Tensor) -> Tensor:
    gradient, hidden = gradient.contiguous(), hidden.contiguous()
    d_hidden = torch.empty_like(hidden)
    rows = hidden.shape[:-1].numel()
    _call("geglu_backward", hidden.dtype, gradient, hidden, d_hidden, rows, gradient.shape[-1])
    return d_hidden


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    x, factors = x.contiguous(), scale.float().contiguous()
    out = torch.empty_like(x)
    _call("norm_forward", x.dtype, x, factors, out, *_rows(x, scale), NORM_EPS)
    return out


def _norm_gradients(gradient: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    gradient, x, factors = gradient.contiguous(), x.contiguous(), scale.float().contiguous()
    images, tokens, channels = _rows(x, scale)
    d_x, shares = torch.empty_like(x), factors.new_empty((images, -(-tokens // _BLOCK), channels))
    _call("norm_backward", x.dtype, gradient, x, factors, d_x, shares, images, tokens, channels, _BLOCK, NORM_EPS)
    return d_x, shares.sum(1).view(scale.shape).to(scale.dtype)


def _rows(x: Tensor, scale: Tensor) -> tuple[int, int, int]:
    """Return the numbers of images that have a scale of their own, of their tokens, and of channels."""
    images = len(scale) if scale.dim() == 2 else 1
    return images, x.shape[:-1].numel() // max(images, 1), x.shape[-1]


def _normalize_and_rotate(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, norm, cos, sin = (tensor.contiguous() for tensor in (x, norm, cos, sin))
    out = torch.empty_like(x)
    _call("cosine_forward", x.dtype, x, norm, cos, sin, out, _BLOCK, *_heads(x, cos))
    return out


def _normalize_and_rotate_gradients(
    gradient: Tensor, x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    gradient, x, norm, cos, sin = (tensor.contiguous() for tensor in (gradient, x, norm, cos, sin))
    images, tokens, heads, *channels = _heads(x, cos)
    d_x, shares = torch.empty_like(x), norm.new_empty((images, -(-tokens // _BLOCK), heads))
    _call(
        "cosine_backward",
        x.dtype,
        *(gradient, x, norm, cos, sin, d_x, shares),
        *(_BLOCK, images, tokens, heads, *channels),
    )
    return d_x, shares.sum((0, 1))


def _heads(x: Tensor, cos: Tensor) -> tuple[int, ...]:
    images, height, width, heads, channels = x.shape
    return images, height * width, heads, channels, cos.shape[-1]


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


geglu_kernel = _operator("geglu(Tensor hidden) -> Tensor", _geglu, _geglu_result)
geglu_gradient = _operator(
    "geglu_gradient(Tensor gradient, Tensor hidden) -> Tensor",
    _geglu_gradient,
    lambda gradient, hidden: _like(hidden),
)
norm_kernel = _operator("rms_norm(Tensor x, Tensor scale) -> Tensor", _norm, lambda x, scale: _like(x))
norm_gradients = _operator(
    "rms_norm_gradients(Tensor gradient, Tensor x, Tensor scale) -> (Tensor, Tensor)",
    _norm_gradients,
    lambda gradient, x, scale: (_like(x), _like(scale)),
)
rotate_kernel = _operator(
    "normalize_and_rotate(Tensor x, Tensor norm, Tensor cos, Tensor sin) -> Tensor",
    _normalize_and_rotate,
    lambda x, norm, cos, sin: _like(x),
)
rotate_gradients = _operator(
    "normalize_and_rotate_gradients(Tensor gradient, Tensor x, Tensor norm, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    _normalize_and_rotate_gradients,
    lambda gradient, x, norm, cos, sin: (_like(x), _like(norm)),
)


# ---- Functions with gradients ----


class _OnePass(torch.autograd.Function):
    """An operation whose `forward` and `gradient` are kernels; all other derivatives are those of the reference."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


def _one_pass(name: str, reference: Callable, kernel: Callable, gradient: Callable) -> Callable:
    def backward(ctx, of_output):
        inputs = ctx.saved_tensors  # asked for once: checkpointing computes them anew each time
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            return vjp_of_reference(reference, inputs, of_output)
        found = gradient(of_output, *inputs)
        return *found, *[None] * (len(inputs) - len(found))  # angles have none

    def jvp(ctx, *tangents):
        # Forward mode cannot be nested; what a gradient does to the output's gradient is linear, and this is its transpose.
        out, back = torch.func.vjp(reference, *ctx.saved_tensors)
        return torch.func.vjp(back, out)[1](tangents)[0]

    def vmap(info, dimensions, *inputs):
        return torch.vmap(reference, dimensions)(*inputs), 0

    methods = {"forward": kernel, "backward": backward, "jvp": jvp, "vmap": vmap}
    function = type(name, (_OnePass,), {name: staticmethod(method) for name, method in methods.items()})

    def apply(*inputs: Tensor) -> Tensor:
        # A fifth of the time for small tensors, where nothing is to be differentiated.
        if torch.is_grad_enabled() or any(unpack_dual(x).tangent is not None for x in inputs):
            return function.apply(*inputs)
        return kernel(*inputs)

    return apply


geglu = _one_pass("GEGLU", geglu_reference, geglu_kernel, lambda *inputs: (geglu_gradient(*inputs),))
rms_norm = _one_pass("RMSNorm", rms_norm_reference, norm_kernel, norm_gradients)
normalize_and_rotate = _one_pass("NormalizeAndRotate", normalize_and_rotate_reference, rotate_kernel, rotate_gradients)
