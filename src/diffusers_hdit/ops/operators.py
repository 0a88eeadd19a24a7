"""Attention kernels as operators of PyTorch: with gradients, and as one node of a traced graph.

Shapes: as in `neighborhood_attention.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .derivatives import vjp_of_reference
from .neighborhood_backends import tiled_attention
from .rotary import normalize_and_rotate_reference


def make_operators(
    name: str, forward: Callable, backward: Callable, device_types: str | None = None
) -> tuple[Callable, Callable]:
    """
    Register `diffusers_hdit::{name}_neighborhood_attention` and its backward pass.

    There is one name for the whole process: unlike the references, kernels are not carried by saved pipelines.

    Args:
        forward: takes

            - query, key, value `(B, h, w, n, d)`, any strides;
            - norm `(n,)` and cos, sin `(h, w, n, c)`, float32 and contiguous, or None: the length that queries and keys
              are normalized to first, and the angles by which their channels `i` and `c + i` are rotated;
            - kh, kw, the window in tokens, odd, at most h and w; scale, a factor on the scores;

            and returns the output, `(B, h, w, n, d)` and contiguous, and log2 of the softmax's denominators,
            `(B, n, h, w)` in float32, which has no gradient.
        backward: takes the gradient of the output, the arguments of `forward` up to `sin`, what it returned, and its
            other arguments; returns the gradients of query, key and value, contiguous, and of norm, `(n,)` in float32
            (empty without a norm).
        device_types: of the tensors, any if not given.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        norm: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        kh: int,
        kw: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return forward(query, key, value, norm, cos, sin, kh, kw, scale)

    def attend_backward(
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        norm: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        out: Tensor,
        lse: Tensor,
        kh: int,
        kw: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backward(gradient, query, key, value, norm, cos, sin, out, lse, kh, kw, scale)

    operator = f"diffusers_hdit::{name}_neighborhood_attention"
    attend = torch.library.custom_op(operator, attend, mutates_args=(), device_types=device_types)
    attend_backward = torch.library.custom_op(
        f"{operator}_backward", attend_backward, mutates_args=(), device_types=device_types
    )

    @attend.register_fake
    def _(query, key, value, norm, cos, sin, kh, kw, scale):
        b, h, w, n, d = query.shape
        return query.new_empty(query.shape), query.new_empty((b, n, h, w), dtype=torch.float32)

    @attend_backward.register_fake
    def _(gradient, query, key, value, norm, cos, sin, out, lse, kh, kw, scale):
        like_norm = query.new_empty(0 if norm is None else norm.shape, dtype=torch.float32)
        return *(query.new_empty(query.shape) for _ in range(3)), like_norm

    def keep(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.options = inputs[6:]

    def gradients(ctx, gradient: Tensor, _: Tensor) -> tuple:
        saved = ctx.saved_tensors  # asked for once: checkpointing computes them anew each time
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            *of_tensors, of_norm = differentiable_gradients(gradient, *saved[:6], *ctx.options)
        else:
            *of_tensors, of_norm = attend_backward(gradient, *saved, *ctx.options)
            of_norm = of_norm if of_norm.numel() else None
        return *of_tensors, of_norm, None, None, None, None, None

    attend.register_autograd(gradients, setup_context=keep)
    return attend, attend_backward


def differentiable_gradients(gradient: Tensor, query, key, value, norm, cos, sin, kh: int, kw: int, scale: float):
    """Return the gradients of query, key, value and norm (None without one) as PyTorch computes them, differentiably."""

    def reference(query, key, value, norm=None):
        if norm is not None:
            tables = (norm.new_empty((*query.shape[1:4], 0)),) * 2 if cos is None else (cos, sin)
            query, key = (normalize_and_rotate_reference(x, norm, *tables) for x in (query, key))
        return tiled_attention(query, key, value, (kh, kw), scale)

    inputs = (query, key, value) if norm is None else (query, key, value, norm)
    found = vjp_of_reference(reference, inputs, gradient)
    return found if norm is not None else (*found, None)
