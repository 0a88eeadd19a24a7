"""Norm and activation of a block, each in one pass over memory where there are kernels for it (`fused_cpp.py`).

Shapes: B batch, D width of a level, F hidden width of its feed-forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import library_problem
from .cosine import EPS
from .remote_code import package_module


def rms_norm(hidden_states: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm of `(B, ..., D)` times a scale `(D,)`, or one for each sample, `(B, D)`; statistics in float32."""
    same = scale.device == hidden_states.device and hidden_states.dtype in (scale.dtype, torch.float32)
    if same and has_kernels(hidden_states):
        return package_module("fused_cpp").rms_norm(hidden_states, scale)
    return rms_norm_formula(hidden_states, scale)


def rms_norm_formula(hidden_states: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() == 2:
        scale = scale.unflatten(0, (-1, *[1] * (hidden_states.dim() - 2)))
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=EPS) * scale


def geglu(hidden_states: Tensor) -> Tensor:
    """`(..., 2·F) -> (..., F)`: the first half times the GELU of the second (Shazeer 2020, arXiv 2002.05202)."""
    if has_kernels(hidden_states):
        return package_module("fused_cpp").geglu(hidden_states)
    return geglu_formula(hidden_states)


def geglu_formula(hidden_states: Tensor) -> Tensor:
    value, gate = hidden_states.chunk(2, dim=-1)
    return value * F.gelu(gate)


def has_kernels(hidden_states: Tensor) -> bool:
    """Whether there are kernels for it: on a CPU, in float32 or bfloat16. In a traced graph there are none, for the compiler
    makes one pass of the formulas and what is around them."""
    return (
        not torch.compiler.is_compiling()
        and type(hidden_states) is Tensor
        and hidden_states.device.type == "cpu"
        and hidden_states.dtype in (torch.float32, torch.bfloat16)
        and not library_problem()
    )
