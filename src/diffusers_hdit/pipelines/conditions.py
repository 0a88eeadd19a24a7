"""Vector conditions, as the network gets them in training and in sampling."""

import torch
from torch import Tensor


def append_presence_flag(conditions: Tensor) -> Tensor:
    """Append an entry of 1 to vectors `(B, D)`, which says that there is a condition: zeros are every column's mean."""
    return torch.nn.functional.pad(conditions, (0, 1), value=1.0)
