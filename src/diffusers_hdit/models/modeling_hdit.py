"""The Hourglass Diffusion Transformer, from patch in to patch out, in the order of the paper.

Crowson et al., "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers",
ICML 2024, arXiv 2401.11605.

    patch in -> RoPE -> conditioning -> blocks (norm, attention, norm, feed-forward), merge, ..., split -> patch out

Shapes: B batch, C channels, H×W pixels, h×w tokens of a level, D width of a level, n heads, d head dim,
M mapping width. Tokens are channels-last, (B, h, w, D), throughout.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..ops.cache import cached_tensors
from ..ops.derivatives import differentiable_attention
from ..ops.geglu import geglu
from ..ops.linear import Linear
from ..ops.neighborhood_attention import BACKENDS, cosine_neighborhood_attention, unavailable_reason
from ..ops.registry import kernels_of
from ..ops.rms_norm import rms_norm
from ..ops.rotary import normalize_and_rotate
from ..utils.remote_code import RemoteCodeMixin, SafeWeights, package_module
from .ablations import (
    ABLATION_ACTIVATIONS,
    ABLATION_NORMS,
    ABLATION_POSITIONS,
    ABLATION_PROCESSORS,
    ABLATION_SKIPS,
    HDiTAxialAttnProcessor,
    HDiTSlidingWindowAttnProcessor,
    PatchInWithPositions,
)
from .checks import (
    Level,
    check_counts,
    check_design_choices,
    check_inputs,
    check_self_cond,
    check_types,
    pair,
    resolve_levels,
)


# Cosines and sines of the angles that queries and keys are rotated by, `(h, w, n, d/4)` each; None without RoPE.
RotaryTables = tuple[Tensor, Tensor] | None


def zero_init(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    return linear


# ----------------------------------------------------------------------------------------------------------------------
# Patches in and out, and between levels


class TokenMerge(nn.Module):
    """Merge p×q tokens into one, `(B, p·h, q·w, D) -> (B, h, w, D')`, in the order (row, column, channel)."""

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int] = (2, 2)):
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(in_features * math.prod(patch_size), out_features)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.patch_size
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height // p, p, width // q, q, dim).transpose(2, 3)
        return self.proj(x.flatten(3))


class TokenSplit(nn.Module):
    """Split each token into p×q, `(B, h, w, D) -> (B, p·h, q·w, D')`: the inverse of `TokenMerge`."""

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int] = (2, 2)):
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(in_features, out_features * math.prod(patch_size))

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.patch_size
        batch, height, width, _ = x.shape
        x = self.proj(x).reshape(batch, height, width, p, q, -1).transpose(2, 3)
        return x.reshape(batch, height * p, width * q, -1)


class TokenSplitWithSkip(TokenSplit):
    """Split tokens, and interpolate between the skip and the result by one learned weight."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        # The lerp weight; the reference's checkpoints call it `fac`.
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Positions: axial rotary embeddings, RoPE (Su et al. 2021, "RoFormer", arXiv 2104.09864). `normalize_and_rotate`
# of `ops` applies them to queries and keys.


def axial_positions(height: int, width: int, device: torch.device, across: int | None = None) -> tuple[Tensor, Tensor]:
    """
    Return the token centres `y (h,)` and `x (w,)` of a grid around 0 that keeps the aspect ratio.

    `across` tokens fill [-1, 1]; as many as the longer side has, if not given.
    """

    def centres(length: int) -> Tensor:
        bound = length / (across or max(height, width))
        edges = torch.linspace(-bound, bound, length + 1, device=device, dtype=torch.float32)
        return (edges[:-1] + edges[1:]) / 2

    return centres(height), centres(width)


def axial_rotary_frequencies(num_heads: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Return frequencies `(n, d/8)`, log-spaced over [π, 10π), dealt out to the heads in turn as in the reference."""
    count = num_heads * head_dim // 8
    frequencies = torch.linspace(
        math.log(math.pi), math.log(10 * math.pi), count + 1, device=device, dtype=torch.float32
    )[:-1].exp()
    return frequencies.view(head_dim // 8, num_heads).T.contiguous()


def axial_rotary_tables(y: Tensor, x: Tensor, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `(h, w, n, d/4)` of the angles in float32: the first half follows y, the second x."""
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
    Return the `axial_rotary_tables` of each level, where a token's position is the mean of those it was merged from.

    Args:
        height, width: tokens of the outermost level.
        across: see `axial_positions`.
        heads: (number, channels) of each level's heads; None for a level without RoPE, which gets no tables.
    """
    tables = []
    y, x = axial_positions(height, width, device, across)
    for i, shape in enumerate(heads):
        if i:
            y, x = y.unflatten(0, (-1, 2)).mean(1), x.unflatten(0, (-1, 2)).mean(1)
        tables.append(None if shape is None else axial_rotary_tables(y, x, *shape))
    return tables


# ----------------------------------------------------------------------------------------------------------------------
# Feed-forward and norms


# Each activation with how many times the hidden width of the feed-forward go into it.
ACTIVATIONS = {"geglu": (geglu, 2), **ABLATION_ACTIVATIONS}


class HDiTFeedForward(nn.Module):
    """Map `(..., D)` to `(..., D)`, by default with a GEGLU; the last projection is zero at initialization."""

    def __init__(self, dim: int, ff_dim: int, dropout: float = 0.0, activation: str = "geglu"):
        super().__init__()
        self.activation, inputs = ACTIVATIONS[activation]
        self.up_proj = Linear(dim, inputs * ff_dim)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = zero_init(Linear(ff_dim, dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.dropout(self.activation(self.up_proj(hidden_states))))


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale and statistics in float32 (nn.RMSNorm warns when autocast mixes its dtypes)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype))


class AdaRMSNorm(nn.Module):
    """RMSNorm of `(B, h, w, D)` with the scale 1 + a linear map of the conditioning `(B, M)`."""

    def __init__(self, dim: int, cond_dim: int):
        super().__init__()
        self.linear = zero_init(Linear(cond_dim, dim))

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return rms_norm(hidden_states, 1 + self.linear(temb))


# ----------------------------------------------------------------------------------------------------------------------
# Conditioning: noise level, augmentation, class and vectors become one embedding (B, M)


class FourierFeatures(nn.Module):
    """Map `(B, in)` to cosines and sines of 2π x Wᵀ, `(B, M)`; the random W `(M/2, in)` is fixed and saved."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(out_features // 2, in_features, dtype=torch.float32))

    def _apply(self, function, recurse: bool = True):
        """Move to devices, but keep float32: rounded phases would shift every noise level."""
        weight = self.weight
        super()._apply(function, recurse)
        if self.weight.dtype != weight.dtype:
            self.weight = weight.to(self.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        # Not a matmul, which autocast would run in half precision.
        f = 2 * math.pi * (x[:, None, :] * self.weight.to(x.dtype)).sum(-1)
        return torch.cat((f.cos(), f.sin()), dim=-1)


class HDiTMappingBlock(nn.Module):
    def __init__(self, dim: int, ff_dim: int, dropout: float):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.ff = HDiTFeedForward(dim, ff_dim, dropout)

    def forward(self, temb: Tensor) -> Tensor:
        return temb + self.ff(self.norm(temb))


class HDiTMappingNetwork(nn.Module):
    """The residual network `(B, M) -> (B, M)` in front of all adaptive norms."""

    def __init__(self, depth: int, dim: int, ff_dim: int, dropout: float):
        super().__init__()
        self.norm_in = RMSNorm(dim)
        self.blocks = nn.ModuleList([HDiTMappingBlock(dim, ff_dim, dropout) for _ in range(depth)])
        self.norm_out = RMSNorm(dim)

    def forward(self, temb: Tensor) -> Tensor:
        temb = self.norm_in(temb)
        for block in self.blocks:
            temb = block(temb)
        return self.norm_out(temb)


class HDiTConditioning(nn.Module):
    """Embed and sum everything that conditions a sample, and map the sum: `(B, M)`."""

    def __init__(
        self,
        dim: int,
        num_classes: int | None,
        augment_cond_dim: int,
        mapping_cond_dim: int,
        mapping: HDiTMappingNetwork,
    ):
        super().__init__()
        self.num_classes, self.augment_cond_dim = num_classes, augment_cond_dim
        self.time_proj = FourierFeatures(1, dim)
        self.time_embedder = Linear(dim, dim)
        self.augment_proj = FourierFeatures(augment_cond_dim, dim) if augment_cond_dim else None
        self.augment_embedder = Linear(dim, dim) if augment_cond_dim else None
        # One row more than there are classes: the last one means "no label".
        self.class_embedder = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.mapping_cond_embedder = Linear(mapping_cond_dim, dim) if mapping_cond_dim else None
        self.mapping = mapping

    def forward(
        self,
        timestep: Tensor,
        class_labels: Tensor | None,
        augment_cond: Tensor | None,
        mapping_cond: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        batch = timestep.shape[0]
        temb = self.time_embedder(self.time_proj(timestep[:, None]).to(dtype))
        if self.augment_proj is not None:
            if augment_cond is None:
                augment_cond = timestep.new_zeros(batch, self.augment_cond_dim)
            temb = temb + self.augment_embedder(self.augment_proj(augment_cond.to(timestep.dtype)).to(dtype))
        if self.class_embedder is not None:
            if class_labels is None:
                class_labels = torch.full((batch,), self.num_classes, device=timestep.device)
            temb = temb + self.class_embedder(class_labels)
        if self.mapping_cond_embedder is not None and mapping_cond is not None:
            temb = temb + self.mapping_cond_embedder(mapping_cond.to(dtype))
        return self.mapping(temb)


# ----------------------------------------------------------------------------------------------------------------------
# Attention processors decide which tokens attend to each other. All divide queries and keys by their norm, multiply
# them by the square root of a learned scale, and rotate them by their position; the softmax then has a scale of 1.


class HDiTAttnProcessor:
    """
    Global attention: every token attends to every token of its level.

    It goes through Diffusers' `dispatch_attention_fn`; choose its kernel with `model.set_attention_backend(...)`.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "HDiTAttention", hidden_states: Tensor, image_rotary_emb: RotaryTables = None) -> Tensor:
        query, key, value = attn.rotated_qkv(hidden_states, image_rotary_emb)
        query, key, value = (x.flatten(1, 2) for x in (query, key, value))
        with differentiable_attention(query, key, value):
            out = dispatch_attention_fn(
                query, key, value, scale=1.0, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        return attn.project_out(out.unflatten(1, hidden_states.shape[1:3]))

    def query_key_pairs(self, height: int, width: int) -> int:
        """Return how many scores there are on a grid of height × width tokens."""
        return (height * width) ** 2


class HDiTNeighborhoodAttnProcessor:
    """
    Neighborhood attention: every token attends to the kernel_size × kernel_size tokens around it (see
    `ops/neighborhood_attention.py`).

    Args:
        kernel_size: side of the neighborhood in tokens, odd.
        backend: the kernel; choose it with `model.set_neighborhood_backend(...)`.
    """

    def __init__(self, kernel_size: int, backend: str = "auto"):
        self.kernel_size, self.backend = kernel_size, backend

    def __call__(self, attn: "HDiTAttention", hidden_states: Tensor, image_rotary_emb: RotaryTables = None) -> Tensor:
        query, key, value = attn.project_qkv(hidden_states)
        # Some kernels normalize and rotate queries and keys as they load them.
        out = cosine_neighborhood_attention(
            query, key, value, self.kernel_size, attn.scale, image_rotary_emb, self.backend
        )
        return attn.project_out(out)

    def query_key_pairs(self, height: int, width: int) -> int:
        return height * width * self.kernel_size**2


class HDiTShiftedWindowAttnProcessor:
    """
    Attention inside windows of a grid that is rolled by `shift` (Liu et al. 2021, arXiv 2103.14030).

    It always runs PyTorch's scaled dot product attention: a shifted window needs a mask, which most backends of
    Diffusers do not take.
    """

    def __init__(self, window_size: int, shift: int):
        self.window_size, self.shift = window_size, shift

    def __call__(self, attn: "HDiTAttention", hidden_states: Tensor, image_rotary_emb: RotaryTables = None) -> Tensor:
        query, key, value = attn.rotated_qkv(hidden_states, image_rotary_emb)
        return attn.project_out(self.attend(query, key, value))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, height, width, heads, dim = query.shape
        size = self.window_size
        rows, columns = height // size, width // size

        def to_windows(x: Tensor) -> Tensor:
            x = x.roll((self.shift, self.shift), (1, 2)) if self.shift else x
            x = x.reshape(batch, rows, size, columns, size, heads, dim).permute(1, 3, 0, 5, 2, 4, 6)
            return x.reshape(rows * columns, batch * heads, size * size, dim)

        mask = self.same_side(height, width, query.device) if self.shift else None
        query, key, value = map(to_windows, (query, key, value))
        with differentiable_attention(query, key, value):
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        out = out.reshape(rows, columns, batch, heads, size, size, dim).permute(2, 0, 4, 1, 5, 3, 6)
        out = out.reshape(batch, height, width, heads, dim)
        return out.roll((-self.shift, -self.shift), (1, 2)) if self.shift else out

    def same_side(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return the mask `(windows, 1, s², s²)` that keeps apart tokens which the roll brought together."""
        size = self.window_size
        wrapped_rows = torch.arange(height, device=device) < self.shift
        wrapped_columns = torch.arange(width, device=device) < self.shift
        side = 2 * wrapped_rows[:, None].int() + wrapped_columns[None].int()
        side = side.reshape(height // size, size, width // size, size).transpose(1, 2).reshape(-1, 1, size * size)
        return side[..., :, None] == side[..., None, :]

    def query_key_pairs(self, height: int, width: int) -> int:
        return height * width * self.window_size**2


class HDiTAttention(nn.Module, AttentionModuleMixin):
    """
    Cosine-similarity attention, `(B, h, w, D) -> (B, h, w, D)`.

    The module has the weights; its processor (see `set_processor`) decides which tokens attend to each other.
    """

    _default_processor_cls = HDiTAttnProcessor
    _available_processors = [
        HDiTAttnProcessor,
        HDiTNeighborhoodAttnProcessor,
        HDiTShiftedWindowAttnProcessor,
        HDiTAxialAttnProcessor,
        HDiTSlidingWindowAttnProcessor,
    ]
    # What Diffusers asks: its caches and guiders for the first, `fuse_projections` for the second.
    is_cross_attention = False
    use_bias = False

    def __init__(self, dim: int, head_dim: int, dropout: float = 0.0, processor=None):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.scale = nn.Parameter(torch.full((dim // head_dim,), 10.0))
        self.dropout = nn.Dropout(dropout)
        # A list of one: the LoRA configurations that people have for Diffusers' attention name this layer `to_out.0`.
        self.to_out = nn.ModuleList([zero_init(Linear(dim, dim))])
        self.set_processor(processor or self._default_processor_cls())

    def forward(self, hidden_states: Tensor, image_rotary_emb: RotaryTables = None) -> Tensor:
        return self.processor(self, hidden_states, image_rotary_emb)

    def project_qkv(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, `(B, h, w, n, d)` each."""
        if self.fused_projections:
            projected = self.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projected = (self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states))
        return tuple(x.unflatten(-1, (-1, self.head_dim)) for x in projected)

    def rotated_qkv(self, hidden_states: Tensor, image_rotary_emb: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same, with queries and keys normalized to the length sqrt(scale), then rotated."""
        query, key, value = self.project_qkv(hidden_states)
        query = normalize_and_rotate(query, self.scale, image_rotary_emb)
        return query, normalize_and_rotate(key, self.scale, image_rotary_emb), value

    def project_out(self, out: Tensor) -> Tensor:
        """Map what the heads computed, `(B, h, w, n, d)`, to the width of the level."""
        return self.to_out[0](self.dropout(out.flatten(-2)))


# ----------------------------------------------------------------------------------------------------------------------
# The design choices by their names in the configuration; the first of each is the paper's. Ablations are registered
# here: a processor is made by a function of the level and of the block's index in it, counted on through the up path.

ATTENTION_PROCESSORS = {
    "neighborhood": lambda level, index: HDiTNeighborhoodAttnProcessor(level.kernel_size),
    "global": lambda level, index: HDiTAttnProcessor(),
    # Every second block is shifted.
    "shifted_window": lambda level, index: HDiTShiftedWindowAttnProcessor(
        level.window_size, shift=level.window_size // 2 if index % 2 else 0
    ),
    "none": None,  # blocks of a feed-forward only
    **ABLATION_PROCESSORS,
}
NORMS = {"ada_rms_norm": AdaRMSNorm, **ABLATION_NORMS}


def split_then(skip_cls: type[nn.Module]):
    """Return a constructor of `skip_cls` around a `TokenSplit` that takes the arguments of `TokenSplitWithSkip`."""
    return lambda in_features, out_features: skip_cls(TokenSplit(in_features, out_features), out_features)


SKIPS = {"lerp": TokenSplitWithSkip, **{name: split_then(cls) for name, cls in ABLATION_SKIPS.items()}}

DESIGN_CHOICES = {
    "position_embedding": ("rope", *ABLATION_POSITIONS, "none"),
    "skip": tuple(SKIPS),
    "activation": tuple(ACTIVATIONS),
    "norm": tuple(NORMS),
    "self_conditioning": (False, True),
}


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


class HDiTTransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind an adaptive norm and around a residual."""

    def __init__(self, level: Level, cond_dim: int, index: int):
        super().__init__()
        processor = ATTENTION_PROCESSORS[level.type](level, index)
        self.norm1 = NORMS[level.norm](level.width, cond_dim)
        self.attn = HDiTAttention(level.width, level.head_dim, level.dropout, processor)
        self.norm2 = NORMS[level.norm](level.width, cond_dim)
        self.ff = HDiTFeedForward(level.width, level.ff_width, level.dropout, level.activation)

    def forward(self, hidden_states: Tensor, temb: Tensor, image_rotary_emb: RotaryTables = None) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states, temb), image_rotary_emb)
        return hidden_states + self.ff(self.norm2(hidden_states, temb))


class HDiTFeedForwardBlock(nn.Module):
    """A block of a level whose attention type is "none"."""

    def __init__(self, level: Level, cond_dim: int, index: int):
        super().__init__()
        self.norm2 = NORMS[level.norm](level.width, cond_dim)
        self.ff = HDiTFeedForward(level.width, level.ff_width, level.dropout, level.activation)

    def forward(self, hidden_states: Tensor, temb: Tensor, image_rotary_emb: None = None) -> Tensor:
        return hidden_states + self.ff(self.norm2(hidden_states, temb))


def make_blocks(level: Level, cond_dim: int, first_index: int = 0) -> nn.ModuleList:
    """Make the blocks of a level's down or up path; `first_index` is the index in the level of the first of them."""
    block = HDiTFeedForwardBlock if level.type == "none" else HDiTTransformerBlock
    return nn.ModuleList([block(level, cond_dim, first_index + i) for i in range(level.depth)])


# ----------------------------------------------------------------------------------------------------------------------
# The network


class HDiTModel(RemoteCodeMixin, SafeWeights, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    r"""
    The Hourglass Diffusion Transformer: a transformer in the shape of a U-Net that denoises images in pixel space.

    Levels are listed from the outermost to the innermost; `depths=(2, 2, 4)` means 2 + 2 + 4 + 2 + 2 blocks. Arguments
    that are given as one value hold for every level; a list has one entry per level.

    Args:
        sample_size (`int` or `(int, int)`): height and width in pixels of the images the model is trained on.
        in_channels (`int`): channels of the image.
        out_channels (`int`, *optional*): channels of the output, `in_channels` if not given.
        patch_size (`int` or `(int, int)`): height and width in pixels of an outermost token.
        widths (`Sequence[int]`): token width D of each level.
        depths (`Sequence[int]`): blocks of each level, on the way down and again on the way up.
        ff_widths (`Sequence[int]`, *optional*): hidden width of the feed-forwards, 3·D if not given.
        attention_types (`Sequence[str]`, *optional*): "neighborhood", "global", "shifted_window", "axial",
            "sliding_window" or "none" for each level. Default: neighborhood everywhere but in the last level, which is
            global.
        attention_head_dim (`int` or a list): d, a multiple of 8 that divides the level's width.
        kernel_size (`int` or a list): side of the neighborhood or of the sliding window in tokens, odd.
        window_size (`int` or a list): side of a window in tokens.
        dropout (`float` or a list): dropout before the last projection of attention and feed-forward.
        mapping_depth, mapping_width, mapping_ff_width, mapping_dropout: the mapping network; its feed-forwards have
            the hidden width 3·`mapping_width` if not given.
        num_classes (`int`, *optional*): number of classes; None for a model without class labels.
        augment_cond_dim (`int`): length of the augmentation vector (9 for Karras et al. 2022), 0 for none.
        mapping_cond_dim (`int`): length of the vector condition, 0 for none.
        conditioning_channels (`int`): channels of an image that conditions the network, for instance one to be
            upscaled; 0 for none.
        position_embedding (`str`): "rope"; "additive", learned vectors that are added to the outermost tokens,
            resampled for sizes other than sample_size; or "none".
        skip (`str`): how a skip and the inner level's output are merged: "lerp", "add" or "concat" (and a linear map
            back to the width).
        activation (`str`): "geglu" or "gelu" in the feed-forwards of the blocks; the mapping network has GEGLU always.
        norm (`str`): "ada_rms_norm" or "ada_layer_norm" in the blocks.
        self_conditioning (`bool`): whether the network also sees an earlier estimate of the clean image (Chen et al.
            2022, arXiv 2208.04202), as `self_cond`.
        position_size (`int` or `(int, int)`, *optional*): see `set_position_size`.

    `position_embedding`, `skip`, `activation`, `norm`, `self_conditioning`, "axial" and "sliding_window" are for
    ablations (see `ablations.py`); the defaults are the paper's.

    Raises:
        ValueError: for lists of different lengths, sizes that do not fit each other, unknown design choices, and
            choices about something that the model does not have (skips between the levels of a model of one level).
    """

    # config.json then says which file Diffusers' AutoModel finds this class in.
    _auto_class = "AutoModel"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["HDiTTransformerBlock", "HDiTFeedForwardBlock"]
    _repeated_blocks = ["HDiTTransformerBlock", "HDiTFeedForwardBlock"]
    _skip_layerwise_casting_patterns = ["patch_in", "conditioning", "norm", "patch_out"]
    # Their phases are fixed; see FourierFeatures.
    _keep_in_fp32_modules = ["time_proj", "augment_proj"]
    # The outer levels are lists of lists; the lists below them are found by Diffusers itself.
    _group_offload_block_modules = ["down_blocks", "up_blocks"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int | tuple[int, int] = 4,
        widths: Sequence[int] = (128, 256, 512),
        depths: int | Sequence[int] = (2, 2, 4),
        ff_widths: int | Sequence[int] | None = None,
        attention_types: str | Sequence[str] | None = None,
        attention_head_dim: int | Sequence[int] = 64,
        kernel_size: int | Sequence[int] = 7,
        window_size: int | Sequence[int] = 8,
        dropout: float | Sequence[float] = 0.0,
        mapping_depth: int = 2,
        mapping_width: int = 256,
        mapping_ff_width: int | None = None,
        mapping_dropout: float = 0.0,
        num_classes: int | None = None,
        augment_cond_dim: int = 9,
        mapping_cond_dim: int = 0,
        conditioning_channels: int = 0,
        position_embedding: str = "rope",
        skip: str = "lerp",
        activation: str = "geglu",
        norm: str = "ada_rms_norm",
        self_conditioning: bool = False,
        position_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        check_types(self, other=DESIGN_CHOICES)
        self.levels = resolve_levels(self.config, tuple(ATTENTION_PROCESSORS))
        check_design_choices(self.config, self.levels, DESIGN_CHOICES)
        self.patch_size = pair("patch_size", patch_size)
        check_counts(self.config, "mapping_width")
        if self_conditioning and out_channels not in (None, in_channels):
            raise ValueError(
                "self_conditioning=True shows the network its own output, which must then be an image like its input; "
                f"got in_channels={in_channels}, out_channels={out_channels}. Leave out_channels out."
            )
        if mapping_width % 2:
            raise ValueError(f"mapping_width must be even (half cosines, half sines), got {mapping_width}.")
        self.sample_size = pair("sample_size", sample_size)
        self.check_size(*self.sample_size)

        outermost = self.levels[0].width
        channels = in_channels + conditioning_channels + (in_channels if self_conditioning else 0)
        self.patch_in = TokenMerge(channels, outermost, self.patch_size)
        if position_embedding in ABLATION_POSITIONS:
            grid = (size // patch for size, patch in zip(self.sample_size, self.patch_size, strict=True))
            self.patch_in = ABLATION_POSITIONS[position_embedding](self.patch_in, *grid, outermost)
        mapping = HDiTMappingNetwork(
            mapping_depth, mapping_width, mapping_ff_width or 3 * mapping_width, mapping_dropout
        )
        self.conditioning = HDiTConditioning(mapping_width, num_classes, augment_cond_dim, mapping_cond_dim, mapping)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.merges, self.splits = nn.ModuleList(), nn.ModuleList()
        for level, inner in zip(self.levels[:-1], self.levels[1:], strict=True):
            self.down_blocks.append(make_blocks(level, mapping_width))
            self.merges.append(TokenMerge(level.width, inner.width))
            self.splits.append(SKIPS[skip](inner.width, level.width))
            self.up_blocks.append(make_blocks(level, mapping_width, first_index=level.depth))
        self.transformer_blocks = make_blocks(self.levels[-1], mapping_width)

        self.set_position_size(position_size)

        self.norm_out = RMSNorm(outermost)
        self.patch_out = TokenSplit(outermost, out_channels or in_channels, self.patch_size)
        zero_init(self.patch_out.proj)
        self.gradient_checkpointing = False
        self.checkpointed_levels = frozenset(range(len(self.levels)))
        self.last_cache_context = None

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "HDiTModel":
        """A new model with the hyperparameters of a preset (`presets.names()`), some of them overridden."""
        presets = package_module("presets")
        return cls(**{**presets.load(name)["model"], **overrides})

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        augment_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
        conditioning_image: Tensor | None = None,
        self_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Args:
            sample (`(B, C, H, W)`): noised image, already multiplied by c_in.
            timestep (number or `(B,)`): c_noise = ln(sigma) / 4, which is the timestep of Diffusers' EDM schedulers.
            class_labels (`(B,)` int64, *optional*): `num_classes` or None mean "no label".
            augment_cond (`(B, augment_cond_dim)`, *optional*): zeros (not augmented) if not given.
            mapping_cond (`(B, mapping_cond_dim)`, *optional*): adds nothing if not given.
            conditioning_image (`(B, conditioning_channels, H, W)`): for a model with conditioning_channels, which
                needs it; of the sample's size, at unit scale whatever the noise level.
            self_cond (`(B, C, H, W)`, *optional*): for a model with self_conditioning: an earlier estimate of the
                clean image, the denoised image D as it is: in the images' units, [-1, 1] or a little more, not
                multiplied by c_in. Zeros mean that there is none, as if not given.

        Returns:
            F, the raw network output, `(B, out_channels, H, W)` in the model's dtype.

        Raises:
            ValueError: for sizes that do not fit (naming the nearest that do) and conditions of a wrong shape.
        """
        check_inputs(self, sample, class_labels, augment_cond, mapping_cond, conditioning_image)
        dtype = self.dtype

        images = self.join_images(sample, conditioning_image, self_cond)
        hidden_states = self.patch_in(images.to(dtype).permute(0, 2, 3, 1))
        image_rotary_embs = self.rotary_tables(*hidden_states.shape[1:3], sample)

        timestep = torch.as_tensor(timestep, dtype=torch.promote_types(dtype, torch.float32), device=sample.device)
        timestep = timestep.expand(sample.shape[0])
        temb = self.conditioning(timestep, class_labels, augment_cond, mapping_cond, dtype)

        skips = []
        for level, (blocks, merge) in enumerate(zip(self.down_blocks, self.merges, strict=True)):
            for block in blocks:
                hidden_states = self.run_block(level, block, hidden_states, temb, image_rotary_embs[level])
            skips.append(hidden_states)
            hidden_states = merge(hidden_states)

        for block in self.transformer_blocks:
            hidden_states = self.run_block(len(skips), block, hidden_states, temb, image_rotary_embs[-1])

        for level in reversed(range(len(self.up_blocks))):
            hidden_states = self.splits[level](hidden_states, skips.pop())
            for block in self.up_blocks[level]:
                hidden_states = self.run_block(level, block, hidden_states, temb, image_rotary_embs[level])

        output = self.patch_out(self.norm_out(hidden_states)).permute(0, 3, 1, 2).contiguous()
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def run_block(
        self, level: int, block: nn.Module, hidden_states: Tensor, temb: Tensor, image_rotary_emb: RotaryTables
    ) -> Tensor:
        """Call a block, or have it recomputed in the backward pass where its level is checkpointed."""
        if self.gradient_checkpointing and level in self.checkpointed_levels and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, hidden_states, temb, image_rotary_emb)
        return block(hidden_states, temb, image_rotary_emb)

    def join_images(self, sample: Tensor, conditioning_image: Tensor | None, self_cond: Tensor | None) -> Tensor:
        """Concatenate the sample's channels and those of the other images that the model takes."""
        check_self_cond(self.config, sample, self_cond)
        if self.config.self_conditioning and self_cond is None:
            self_cond = torch.zeros_like(sample)
        others = [image.to(self.dtype) for image in (conditioning_image, self_cond) if image is not None]
        return torch.cat((sample.to(self.dtype), *others), dim=1) if others else sample

    def rotary_tables(self, height: int, width: int, like: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Return the tables of each level for height × width outermost tokens; None for a level without RoPE."""
        heads = tuple((level.heads, level.head_dim) if level.rotary else None for level in self.levels)
        return cached_tensors(hourglass_rotary_tables, like, height, width, self.tokens_across, heads, like.device)

    @property
    def size_rule(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The numbers that height and width in pixels must be multiples of, and their minima; (height, width) each."""
        divisors, least = [], []
        for patch in self.patch_size:
            divisor, smallest = 1, 1
            for i, level in enumerate(self.levels):
                token = patch * 2**i
                divisor = math.lcm(divisor, token * (level.window_size if level.type == "shifted_window" else 1))
                smallest = max(smallest, token * (level.kernel_size if level.type == "neighborhood" else 1))
            divisors.append(divisor)
            least.append(-(-smallest // divisor) * divisor)
        return tuple(divisors), tuple(least)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless images of height × width pixels fit all levels."""
        problems = []
        for name, size, divisor, smallest in zip(("height", "width"), (height, width), *self.size_rule, strict=True):
            if size % divisor or size < smallest:
                below, above = size // divisor * divisor, -(-size // divisor) * divisor
                nearest = sorted({max(below, smallest), max(above, smallest)})
                problems.append(
                    f"{name} {size} must be a multiple of {divisor} (patch, levels and windows) and at least "
                    f"{smallest} (neighborhoods must fit their level); the nearest that works: "
                    f"{' or '.join(map(str, nearest))}"
                )
        if problems:
            raise ValueError(f"This model can't process {height}×{width} images: {'; '.join(problems)}.")

    def set_position_size(self, size: int | tuple[int, int] | None) -> None:
        """
        Choose the positions of the tokens of images of other sizes than the trained one; saved in the configuration.

        Args:
            size: None (the paper's): every image fills [-1, 1], so that larger ones have their tokens closer together.
                A number of pixels, or (height, width): images of that size fill [-1, 1], and all others keep its
                spacing, so that larger ones reach further out. Additive positions know the spacing of `sample_size`
                only; outside of it, where nothing was learned, they are those of the nearest token of its border.

        Raises:
            ValueError: for a model without positions, and for another size than `sample_size` with additive ones.
        """
        additive = isinstance(self.patch_in, PatchInWithPositions)
        rotary = any(level.rotary for level in self.levels)
        if size is not None and not (additive or rotary):
            raise ValueError(f"position_size={size} was given, but this model has no positions. Leave it out.")
        if size is not None and additive and pair("position_size", size) != self.sample_size:
            raise ValueError(
                f"position_size={size}: additive positions keep the spacing of the sample_size they were learned at, "
                f"{self.sample_size}. Give that, or None."
            )
        if additive:
            self.patch_in.keep_spacing = size is not None
        tokens = None if size is None else zip(pair("position_size", size), self.patch_size, strict=True)
        self.tokens_across = None if tokens is None else max(length / patch for length, patch in tokens)
        self.register_to_config(position_size=size)

    def set_gradient_checkpointing_levels(self, levels: Sequence[int]) -> None:
        """
        Recompute only these levels' blocks in the backward pass (0 is the outermost, which takes most of the memory);
        an empty list recomputes none. `enable_gradient_checkpointing()` is for all levels.

        Raises:
            ValueError: for a level that the model does not have.
        """
        if not set(levels) <= set(range(len(self.levels))):
            raise ValueError(f"this model has the levels 0 to {len(self.levels) - 1}; got {list(levels)}.")
        if levels:
            self.enable_gradient_checkpointing()
        else:
            self.disable_gradient_checkpointing()
        self.checkpointed_levels = frozenset(levels)

    def enable_cache(self, config: Any) -> None:
        """
        Enable one of Diffusers' caches for the steps of a pipeline.

        `FirstBlockCacheConfig`, `TaylorSeerCacheConfig` and others cache what the middle level computes; the outer
        levels always run. `PyramidAttentionBroadcastConfig` reuses the output of the attention of all levels; its
        timesteps are c_noise = ln(sigma) / 4 here, so give it a range of those, for instance
        `spatial_attention_timestep_skip_range=(-1.0, 0.5)`.

        Raises:
            ValueError: for a middle level of fewer than two blocks, which has nothing to skip.
        """
        # Not at import: this makes Diffusers import all of its transformers.
        from diffusers.hooks import PyramidAttentionBroadcastConfig
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        if not isinstance(config, PyramidAttentionBroadcastConfig):
            if len(self.transformer_blocks) < 2:
                raise ValueError(
                    f"the middle level has {len(self.transformer_blocks)} blocks; caching needs two or more, because "
                    "the first one always runs."
                )
            metadata = TransformerBlockMetadata(return_hidden_states_index=0)
            TransformerBlockRegistry.register(type(self.transformer_blocks[0]), metadata)
        super().enable_cache(config)

    @contextmanager
    def cache_context(self, name: str, **kwargs) -> Iterator[None]:
        """
        Name the batch that is evaluated, as in Diffusers. Pyramid Attention Broadcast keeps one memory for all names,
        which is emptied when the name changes: steps with and without guidance have batches of different sizes.
        """
        from diffusers.hooks import PyramidAttentionBroadcastConfig

        if name != self.last_cache_context and isinstance(self._cache_config, PyramidAttentionBroadcastConfig):
            self._reset_stateful_cache()
        self.last_cache_context = name
        with super().cache_context(name, **kwargs):
            yield

    def set_neighborhood_backend(self, backend: str) -> None:
        """
        Choose the kernel of all neighborhood levels; the choice can be changed at any time.

        Args:
            backend: "auto" (on CUDA "triton", else "natten"; on a CPU "cpp"; "tiled" where they can't run), "natten",
                "triton", "cpp", "tiled", "flex", "dense", or a registered kernel. All are exact.

        Raises:
            ValueError: for an unknown name, or one that can't work on this model's device and dtype.
        """
        known = ("auto", *BACKENDS, *kernels_of("neighborhood_attention"))
        if backend not in known:
            names = ", ".join(map(repr, dict.fromkeys(known)))
            raise ValueError(f"backend must be one of {names}; got {backend!r}.")
        levels = [level for level in self.levels if level.type == "neighborhood"]
        for level in levels if backend != "auto" else ():
            reason = unavailable_reason(
                backend, device=self.device, dtype=self.dtype, head_dim=level.head_dim, training=False
            )
            if reason:
                raise ValueError(reason)
        for processor in self.attn_processors.values():
            if isinstance(processor, HDiTNeighborhoodAttnProcessor):
                processor.backend = backend


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast as `from_pretrained(dtype=dtype)` does: the parameters, but not the fixed Fourier projections."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
