"""Alternatives to the paper's design choices, to repeat its ablations; `modeling_hdit.py` registers them by name.

Shapes as in `modeling_hdit.py`, which imports this module: what is needed from there is passed in.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ..ops.linear import Linear
from ..ops.neighborhood_attention import sliding_window_attention


# ----------------------------------------------------------------------------------------------------------------------
# Attention processors


class HDiTSlidingWindowAttnProcessor:
    """Every token attends to the kernel_size × kernel_size tokens centred on it, and to fewer at a border
    (Ramachandran et al. 2019, "Stand-Alone Self-Attention in Vision Models", arXiv 1906.05909)."""

    def __init__(self, kernel_size: int):
        self.kernel_size = kernel_size

    def __call__(self, attn: nn.Module, hidden_states: Tensor, image_rotary_emb=None) -> Tensor:
        query, key, value = attn.rotated_qkv(hidden_states, image_rotary_emb)
        return attn.project_out(sliding_window_attention(query, key, value, self.kernel_size, scale=1.0))

    def query_key_pairs(self, height: int, width: int) -> int:
        reach = self.kernel_size // 2

        def pairs(length: int) -> int:
            return sum(min(i + reach, length - 1) - max(i - reach, 0) + 1 for i in range(length))

        return pairs(height) * pairs(width)


class HDiTAxialAttnProcessor:
    """
    Attention inside every row, then inside every column (Ho et al. 2019, "Axial Attention in Multidimensional
    Transformers", arXiv 1912.12180).

    Both happen in one block and share its projections: the queries and keys are the same, and the output of the rows
    is the value of the columns. So every token reaches every other one through the token in its row and the other's
    column, with as many parameters as with any other processor. (Ho et al. give each axis a layer with its own
    projections.)
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: nn.Module, hidden_states: Tensor, image_rotary_emb=None) -> Tensor:
        query, key, value = attn.rotated_qkv(hidden_states, image_rotary_emb)
        return attn.project_out(self.attend(query, key, value))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = self.attend_inside_lines(query, key, value)
        columns = (x.transpose(1, 2) for x in (query, key, rows))
        return self.attend_inside_lines(*columns).transpose(1, 2)

    def attend_inside_lines(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend along the third axis of `(B, lines, tokens, n, d)`, each line by itself."""
        lines = (x.flatten(0, 1) for x in (query, key, value))
        out = dispatch_attention_fn(
            *lines, scale=1.0, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out.unflatten(0, query.shape[:2])

    def query_key_pairs(self, height: int, width: int) -> int:
        return height * width * (height + width)


# ----------------------------------------------------------------------------------------------------------------------
# Norm of a block


class AdaLayerNorm(nn.Module):
    """
    LayerNorm of `(B, h, w, D)` with a scale of 1 + s and a shift t, both linear maps of the conditioning `(B, M)` that
    are zero at initialization (Peebles and Xie 2023, arXiv 2212.09748, without their gate).
    """

    def __init__(self, dim: int, cond_dim: int):
        super().__init__()
        self.linear = Linear(cond_dim, 2 * dim)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(temb)[:, None, None].chunk(2, dim=-1)
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6) * (1 + scale) + shift


# ----------------------------------------------------------------------------------------------------------------------
# Positions and skips


class PatchInWithPositions(nn.Module):
    """
    Map patches `(B, H, W, C)` to tokens `(B, h, w, D)` and add a learned vector for each place (Dosovitskiy et al.
    2021, arXiv 2010.11929).

    The vectors are those of the model's sample_size. For other sizes they are resampled linearly; with `keep_spacing`,
    the grid keeps its spacing instead, and tokens outside of it get the vectors of its border.
    """

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
        """Return `(1, height, width, D)`: the learned vectors, or resampled ones in float32 or better."""
        known = self.positions.shape[1:3]
        if (height, width) == known:
            return self.positions
        positions = self.positions.permute(0, 3, 1, 2).to(torch.promote_types(self.positions.dtype, torch.float32))
        if self.keep_spacing:
            # Token centres in units of the learned grid's halves: a token between two learned ones gets their mean.
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
    """Split the inner level's tokens `(B, h, w, D')` to `(B, 2h, 2w, D)` and add the skip."""

    def __init__(self, split: nn.Module, dim: int):
        super().__init__()
        self.split = split

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return skip + self.split(x)


class SplitAndConcat(nn.Module):
    """
    Split the inner level's tokens, concatenate them to the skip, and map both back to the width D (Ronneberger et al.
    2015, arXiv 1505.04597).
    """

    def __init__(self, split: nn.Module, dim: int):
        super().__init__()
        self.split = split
        self.mix = Linear(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.mix(torch.cat((skip, self.split(x)), dim=-1))


# ----------------------------------------------------------------------------------------------------------------------
# By the names that the configuration has for them

ABLATION_PROCESSORS = {
    "axial": lambda level, index: HDiTAxialAttnProcessor(),
    "sliding_window": lambda level, index: HDiTSlidingWindowAttnProcessor(level.kernel_size),
}
# The activation of a feed-forward, and how many times its hidden width go in. GELU without a gate, as in ViT and DiT,
# has the hidden width of GEGLU, and so fewer weights.
ABLATION_ACTIVATIONS = {"gelu": (F.gelu, 1)}
ABLATION_NORMS = {"ada_layer_norm": AdaLayerNorm}
ABLATION_POSITIONS = {"additive": PatchInWithPositions}
ABLATION_SKIPS = {"add": SplitAndAdd, "concat": SplitAndConcat}
