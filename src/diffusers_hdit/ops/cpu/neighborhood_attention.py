"""Neighborhood attention on the CPU in C++ (`neighborhood_attention.cpp`).

It computes in float32; float16 and bfloat16 are converted.

Shapes: as in `ops/neighborhood_attention.py`.
"""

import torch.nn.functional as F
from torch import Tensor

from ..operators import make_operators
from .library import call


_CHANNELS = 16  # of whose multiples the kernels take heads


def _ready(*tensors: Tensor) -> list[Tensor]:
    """Return tensors in float32 with adjacent channels, as many as the kernels take."""
    missing = -tensors[0].shape[-1] % _CHANNELS
    tensors = [F.pad(x.float(), (0, missing)) if missing else x.float() for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _call(function: str, tensors: tuple, strided: tuple, cos: Tensor | None, kh: int, kw: int, scale: float) -> None:
    sizes = [*tensors[0].shape, kh, kw, 0 if cos is None else cos.shape[-1]]
    strides = [stride for x in strided for stride in x.stride()[:4]]
    call(function, *tensors, sizes, strides, scale)


def _forward(query, key, value, norm, cos, sin, kh, kw, scale) -> tuple[Tensor, Tensor]:
    b, h, w, n, d = query.shape
    q, k, v = _ready(query, key, value)
    out, lse = q.new_empty(q.shape), q.new_empty((b, n, h, w))
    _call("neighborhood_forward", (q, k, v, norm, cos, sin, out, lse), (q, k, v, out), cos, kh, kw, scale)
    return out[..., :d].to(query.dtype).contiguous(), lse


def _backward(gradient, query, key, value, norm, cos, sin, out, lse, kh, kw, scale) -> tuple[Tensor, ...]:
    b, h, _, n, d = query.shape
    q, k, v, o, g = _ready(query, key, value, out, gradient)
    o = o.contiguous()
    gradients = q.new_empty(q.shape), q.new_zeros(q.shape), q.new_zeros(q.shape)
    shares = q.new_empty(0 if norm is None else (2, b, n, h))
    tensors = (q, k, v, norm, cos, sin, o, g, lse, *gradients, shares)
    _call("neighborhood_backward", tensors, (q, k, v, o, g), cos, kh, kw, scale)
    of_norm = shares if norm is None else shares.sum((0, 1, 3))
    return *(x[..., :d].to(query.dtype).contiguous() for x in gradients), of_norm


attend, attend_backward = make_operators("cpp", _forward, _backward, device_types="cpu")
