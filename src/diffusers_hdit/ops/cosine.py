"""Cosine-similarity attention: queries and keys are scaled to one length and rotated by their place, then attend.

Crowson et al. 2024, arXiv 2401.11605; rotary embeddings: Su et al. 2021, "RoFormer", arXiv 2104.09864.

Shapes: B batch, h×w tokens of a level, n heads, d head dim.
"""

import torch
from torch import Tensor

from ..utils.remote_code import package_module
from .compiled import has_kernels


EPS = 1e-6


def cosine_similarity(x: Tensor, scale: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """
    Queries or keys `(B, h, w, n, d)` brought to the length sqrt(scale) of their head, then rotated; logits of two such
    vectors are scale * cosine similarity.

    At least float32 inside: an angle or a norm rounded to bfloat16 would move every logit.

    Args:
        scale: `(n,)`, positive.
        rotary: cosines and sines as of `axial_rotary_tables`, None for none.
    """
    norm = scale.to(torch.promote_types(x.dtype, torch.float32)).sqrt()
    cos, sin = (norm.new_empty((*x.shape[1:4], 0)),) * 2 if rotary is None else rotary
    if (
        norm.device == x.device == cos.device
        and cos.dtype == torch.float32
        and has_kernels(x)
        and not cos.requires_grad
    ):
        return package_module("ops.cpu.fused").scale_and_turn(x, norm, cos, sin)
    return scale_and_turn_formula(x, norm, cos, sin)


def scale_and_turn_formula(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """To the lengths norm `(n,)`, then by the angles of cos and sin `(h, w, n, c)`."""
    y = x.to(norm.dtype)
    y = y * (norm[:, None] * torch.rsqrt(y.square().sum(-1, keepdim=True) + EPS))
    pairs = cos.shape[-1]
    first, second, rest = y.split((pairs, pairs, y.shape[-1] - 2 * pairs), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)
