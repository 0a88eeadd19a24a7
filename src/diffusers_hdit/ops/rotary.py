"""Queries and keys of cosine-similarity attention: normalized to one length, then rotated by their position.

Crowson et al. 2024, arXiv 2401.11605; rotary embeddings: Su et al. 2021, "RoFormer", arXiv 2104.09864. The angles are
computed in `models/modeling_hdit.py`. Shapes: B batch, h×w tokens of a level, n heads, d head dim, c rotated pairs.
"""

import torch
from torch import Tensor

from .registry import find_kernel
from .rms_norm import NORM_EPS


def normalize_and_rotate(x: Tensor, scale: Tensor, image_rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:
    """
    Normalize each head of queries or keys `(B, h, w, n, d)` to the length sqrt(scale), then rotate it.

    The logits of two such vectors are scale * cosine similarity. At least float32 is used inside: an angle or a norm
    rounded to bfloat16 would move every logit.

    Args:
        scale: `(n,)`, positive.
        image_rotary_emb: cosines and sines `(h, w, n, c)` of the angles by which the channels i and c + i are rotated;
            None for no rotation.
    """
    norm = scale.to(torch.promote_types(x.dtype, torch.float32)).sqrt()
    cos, sin = (norm.new_empty((*x.shape[1:4], 0)),) * 2 if image_rotary_emb is None else image_rotary_emb
    run = find_kernel("normalize_and_rotate", x, norm, cos, sin) or normalize_and_rotate_reference
    return run(x, norm, cos, sin)


def normalize_and_rotate_reference(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """L2-normalize each head to length `norm (n,)`, then apply the rotary embedding `cos, sin (h, w, n, c)`."""
    y = x.to(norm.dtype)
    y = y * (norm[:, None] * torch.rsqrt(y.square().sum(-1, keepdim=True) + NORM_EPS))
    pairs = cos.shape[-1]
    first, second, rest = y.split((pairs, pairs, y.shape[-1] - 2 * pairs), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)
