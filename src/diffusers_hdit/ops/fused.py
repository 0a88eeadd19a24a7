"""Norm and activation of a block, each in one pass over memory where there are kernels for it (`fused_cpp.py`).

Shapes: B batch, D width of a level, F hidden width of its feed-forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.remote_code import package_module
from .compiled import has_kernels
from .cosine import EPS


def rms_norm(hidden_states: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm of `(B, ..., D)` times a scale `(D,)`, or one for each sample, `(B, D)`; statistics in float32."""
    same = scale.device == hidden_states.device and hidden_states.dtype in (scale.dtype, torch.float32)
    if same and has_kernels(hidden_states):
        return package_module("ops.cpu.fused").rms_norm(hidden_states, scale)
    return rms_norm_formula(hidden_states, scale)


def rms_norm_formula(hidden_states: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() == 2:
        scale = scale.unflatten(0, (-1, *[1] * (hidden_states.dim() - 2)))
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=EPS) * scale


def geglu(hidden_states: Tensor) -> Tensor:
    """`(..., 2·F) -> (..., F)`: the first half times the GELU of the second (Shazeer 2020, arXiv 2002.05202)."""
    if has_kernels(hidden_states):
        return package_module("ops.cpu.fused").geglu(hidden_states)
    return geglu_formula(hidden_states)


def geglu_formula(hidden_states: Tensor) -> Tensor:
    value, gate = hidden_states.chunk(2, dim=-1)
    return value * F.gelu(gate)
