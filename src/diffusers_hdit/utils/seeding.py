"""Seeds and permutations that are functions of their arguments alone: the same in every process and every run."""

import hashlib

import numpy as np
import torch


def mixed_seed(*keys) -> int:
    """Return 64 well-mixed bits that depend on `keys` only; unlike `hash()`, they are the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big")


def permutation(count: int, *keys) -> np.ndarray:
    """Return a permutation of 0..count-1, (count,) int64, that depends on `keys` only."""
    generator = torch.Generator().manual_seed(mixed_seed(*keys))
    return torch.randperm(count, generator=generator).numpy()
