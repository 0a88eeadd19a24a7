"""What the paper's parts can be exchanged for, to ask its ablations again. `HDiTModel` chooses in its constructor.

Shapes as in `modeling_hdit.py`, which stands above this module: parts of the network that are needed here are handed in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cosine import CosineAttention
from ..ops.linear import Linear
from ..ops.neighborhood import sliding_window_attention


# ----------------------------------------------------------------------------------------------------------------------
# Attention kinds


class SlidingWindowAttention(CosineAttention):
    """Every token sees the kernel_size × kernel_size tokens centred on it, fewer at a border (Ramachandran et al. 2019,
    "Stand-Alone Self-Attention in Vision Models", arXiv 1906.05909)."""

    def __init__(self, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size

    def query_key_pairs(self, height: int, width: int) -> int:
        reach = self.kernel_size // 2

        def pairs(length: int) -> int:
            return sum(min(i + reach, length - 1) - max(i - reach, 0) + 1 for i in range(length))

        return pairs(height) * pairs(width)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sliding_window_attention(query, key, value, self.kernel_size, scale=1.0)


class AxialAttention(CosineAttention):
    """Attention inside every row, then inside every column (Ho et al. 2019, "Axial Attention in Multidimensional
    Transformers", arXiv 1912.12180).

    Both are in one block and share its projections: the queries and keys are the same, and what the rows give is the
    values of the columns. So every token sees every other one, by way of the token in its row and the other's column,
    with the parameters of any other kind. (Ho et al. give each axis a layer with projections of its own.)
    """

    def query_key_pairs(self, height: int, width: int) -> int:
        return height * width * (height + width)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def inside_lines(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """Along the third axis. Four axes, which is what the fused kernels take."""
            lines = [x.transpose(2, 3).flatten(0, 1) for x in (query, key, value)]
            out = F.scaled_dot_product_attention(*lines, scale=1.0)
            return out.unflatten(0, query.shape[:2]).transpose(2, 3)

        columns = [x.transpose(1, 2) for x in (query, key, inside_lines(query, key, value))]
        return inside_lines(*columns).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a block


class GELUFeedForward(nn.Module):
    """`(..., D) -> (..., D)`: GELU without a gate, as in ViT and DiT; of the same hidden width, so with fewer weights."""

    def __init__(self, dim: int, ff_dim: int, dropout: float = 0.0):
        super().__init__()
        self.up_proj = Linear(dim, ff_dim)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = Linear(ff_dim, dim)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.dropout(F.gelu(self.up_proj(hidden_states))))


class AdaLayerNorm(nn.Module):
    """LayerNorm of `(B, h, w, D)` with a scale of 1 + s and a shift t, both linear maps of the conditioning `(B, M)` that
    start at zero (Peebles and Xie 2023, arXiv 2212.09748, without their gate)."""

    def __init__(self, dim: int, cond_dim: int):
        super().__init__()
        self.linear = Linear(cond_dim, 2 * dim)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_states: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.linear(cond)[:, None, None].chunk(2, dim=-1)
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6) * (1 + scale) + shift


# ----------------------------------------------------------------------------------------------------------------------
# Positions and skips


class PatchInWithPositions(nn.Module):
    """Patches `(B, H, W, C) -> (B, h, w, D)` plus a learned vector for each place (Dosovitskiy et al. 2021, arXiv
    2010.11929). The vectors are those of the model's sample_size; other sizes get them resampled linearly, or, with
    `keep_spacing`, those in the middle, continued outside by the ones at the border."""

    def __init__(self, merge: nn.Module, height: int, width: int, dim: int):
        super().__init__()
        self.merge = merge
        self.keep_spacing = False
        self.positions = nn.Parameter(torch.empty(1, height, width, dim))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.merge(x)
        return x + self.positions_for(*x.shape[1:3]).to(x.dtype)

    def positions_for(self, height: int, width: int) -> Tensor:
        """`(1, height, width, D)`, at least float32 where they are not the learned ones themselves."""
        known = self.positions.shape[1:3]
        if (height, width) == known:
            return self.positions
        positions = self.positions.permute(0, 3, 1, 2).to(torch.promote_types(self.positions.dtype, torch.float32))
        if self.keep_spacing:
            # Token centres in units of the learned grid's halves: those between two tokens get a mean of both.
            y, x = (
                (torch.arange(n, device=positions.device, dtype=positions.dtype) * 2 + 1 - n) / k
                for n, k in zip((height, width), known, strict=True)
            )
            grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)[None]
            resampled = F.grid_sample(positions, grid, padding_mode="border", align_corners=False)
        else:
            resampled = F.interpolate(positions, (height, width), mode="bilinear", antialias=True)
        return resampled.permute(0, 2, 3, 1)


class SplitAndAdd(nn.Module):
    """What comes up, `(B, h, w, D')` split to `(B, 2h, 2w, D)`, plus the skip."""

    def __init__(self, split: nn.Module, dim: int):
        super().__init__()
        self.split = split

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return skip + self.split(x)


class SplitAndConcat(nn.Module):
    """The skip and what comes up side by side, and a linear map back to D (Ronneberger et al. 2015, arXiv 1505.04597)."""

    def __init__(self, split: nn.Module, dim: int):
        super().__init__()
        self.split = split
        self.mix = Linear(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.mix(torch.cat((skip, self.split(x)), dim=-1))
