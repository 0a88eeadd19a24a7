"""The GEGLU activation, as one pass over memory where a kernel runs. Shapes: F hidden width of a feed-forward."""

import torch.nn.functional as F
from torch import Tensor

from .registry import find_kernel


def geglu(hidden_states: Tensor) -> Tensor:
    """Multiply the first half of `(..., 2·F)` by the GELU of the second, `(..., F)` (Shazeer 2020, arXiv 2002.05202)."""
    run = find_kernel("geglu", hidden_states) or geglu_reference
    return run(hidden_states)


def geglu_reference(hidden_states: Tensor) -> Tensor:
    value, gate = hidden_states.chunk(2, dim=-1)
    return value * F.gelu(gate)
