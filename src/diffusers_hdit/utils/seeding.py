"""Seeds and permutations that are functions of their arguments alone: the same in every process and every run."""

import hashlib

import numpy as np
import torch


def mixed_seed(*parts) -> int:
    """Return 64 well-mixed bits that depend on `parts` only; unlike `hash()`, they are the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def permutation(count: int, *parts) -> np.ndarray:
    """Return a permutation of 0..count-1, (count,) int64, that depends on `parts` only."""
    generator = torch.Generator().manual_seed(mixed_seed(*parts))
    return torch.randperm(count, generator=generator).numpy()
