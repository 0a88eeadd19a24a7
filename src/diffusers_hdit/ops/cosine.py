"""Cosine-similarity attention: queries and keys are scaled to one length and rotated by their place, then attend.

Crowson et al. 2024, arXiv 2401.11605; rotary embeddings: Su et al. 2021, "RoFormer", arXiv 2104.09864.

Shapes: B batch, h×w tokens of a level, n heads, d head dim.
"""

import math

import torch
from torch import Tensor, nn

from ..utils.remote_code import package_module
from .compiled import has_kernels


EPS = 1e-6


def axial_positions(height: int, width: int, device: torch.device, across: int | None = None) -> tuple[Tensor, Tensor]:
    """Token centres `y (h,)` and `x (w,)` on a grid around 0, aspect ratio kept, of which `across` tokens fill [-1, 1]: as
    many as the longer side has, if not given."""

    def centres(length: int) -> Tensor:
        bound = length / (across or max(height, width))
        edges = torch.linspace(-bound, bound, length + 1, device=device, dtype=torch.float32)
        return (edges[:-1] + edges[1:]) / 2

    return centres(height), centres(width)


def axial_rotary_frequencies(num_heads: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Frequencies `(n, d/8)`, log-spaced over [π, 10π) and dealt out to the heads in turn, as the reference does."""
    count = num_heads * head_dim // 8
    frequencies = torch.linspace(
        math.log(math.pi), math.log(10 * math.pi), count + 1, device=device, dtype=torch.float32
    )[:-1].exp()
    return frequencies.view(head_dim // 8, num_heads).T.contiguous()


def axial_rotary_tables(y: Tensor, x: Tensor, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(h, w, n, d/4)` of the angles, float32: the first half turns with y, the second with x."""
    frequencies = axial_rotary_frequencies(num_heads, head_dim, y.device)
    angles_y, angles_x = y[:, None, None] * frequencies, x[:, None, None] * frequencies
    shape = (len(y), len(x), *frequencies.shape)

    def table(function) -> Tensor:
        rows, columns = function(angles_y)[:, None].expand(shape), function(angles_x)[None].expand(shape)
        return torch.cat((rows, columns), dim=-1)

    return table(torch.cos), table(torch.sin)


def hourglass_rotary_tables(
    height: int, width: int, across: int | None, heads: tuple[tuple[int, int] | None, ...], device: torch.device
) -> list[tuple[Tensor, Tensor] | None]:
    """
    `axial_rotary_tables` of each level, 2×2 tokens of which are one of the next; None for a level that rotates nothing.

    Args:
        height, width: tokens of the outermost level.
        across: see `axial_positions`.
        heads: number and channels of the heads of each level that rotates.
    """
    tables = []
    y, x = axial_positions(height, width, device, across)
    for i, shape in enumerate(heads):
        if i:
            y, x = y.unflatten(0, (-1, 2)).mean(1), x.unflatten(0, (-1, 2)).mean(1)
        tables.append(None if shape is None else axial_rotary_tables(y, x, *shape))
    return tables


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


class CosineAttention(nn.Module):
    """A kind of attention, without parameters: subclasses say which tokens see each other, in `attend` or in `forward`."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """`(B, h, w, n, d)` of queries, keys and values of that shape, as they are projected; the rest as for
        `cosine_similarity`."""
        query, key = cosine_similarity(query, scale, rotary), cosine_similarity(key, scale, rotary)
        return self.attend(query, key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same of scaled and rotated queries and keys: the scale of the softmax is 1."""
        raise NotImplementedError
