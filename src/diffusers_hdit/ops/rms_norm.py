"""RMSNorm, as one pass over memory where a kernel runs. Shapes: B batch, D width of a level."""

import torch.nn.functional as F
from torch import Tensor

from .registry import find_kernel


NORM_EPS = 1e-6


def rms_norm(hidden_states: Tensor, scale: Tensor) -> Tensor:
    """Normalize `(B, ..., D)` and multiply by a scale `(D,)`, or by one for each sample `(B, D)`; statistics in float32."""
    run = find_kernel("rms_norm", hidden_states, scale) or rms_norm_reference
    return run(hidden_states, scale)


def rms_norm_reference(hidden_states: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() == 2:
        scale = scale.unflatten(0, (-1, *[1] * (hidden_states.dim() - 2)))
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=NORM_EPS) * scale
