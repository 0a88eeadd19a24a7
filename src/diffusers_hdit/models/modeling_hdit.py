"""The Hourglass Diffusion Transformer, from the patches in to the patches out, in the order of the paper.

Crowson et al., "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers",
ICML 2024, arXiv 2401.11605.

Shapes: B batch, C channels, H×W pixels, h×w tokens of a level, D width of a level, n heads, d head dim,
M mapping width. Tokens are channels-last, (B, h, w, D), throughout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..ops.cosine import CosineAttention, hourglass_rotary_tables
from ..ops.fused import geglu, rms_norm
from ..ops.linear import Linear
from ..ops.neighborhood import BACKENDS, cosine_neighborhood_attention, unavailable_reason, whole_grid_attention
from ..ops.plans import plan
from ..utils.remote_code import CarriesCode, SafeWeights, package_module
from .ablations import (
    AdaLayerNorm,
    AxialAttention,
    GELUFeedForward,
    PatchInWithPositions,
    SlidingWindowAttention,
    SplitAndAdd,
    SplitAndConcat,
)
from .conditions import check_class_labels, check_conditioning_image, check_vector
from .configuration_hdit import Level, check_parts, pair, resolve_levels


@dataclass
class HDiTModelOutput(BaseOutput):
    """
    Attributes:
        sample (`torch.Tensor` of shape `(B, C, H, W)`): the raw network output F, not yet the denoised image.
    """

    sample: Tensor


# ----------------------------------------------------------------------------------------------------------------------
# Conditioning: noise level, augmentation, class and vectors to one embedding (B, M)


class FourierFeatures(nn.Module):
    """`(B, in) -> (B, M)`: cosines and sines of 2π x Wᵀ with a fixed random W `(M/2, in)` that is stored with the weights."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(out_features // 2, in_features, dtype=torch.float32))

    def _apply(self, function, recurse: bool = True):
        """Moves to devices, but keeps float32: rounded phases would shift every noise level."""
        weight = self.weight
        super()._apply(function, recurse)
        if self.weight.dtype != weight.dtype:
            self.weight = weight.to(self.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        # Not a matmul, which autocast would run in half precision.
        f = 2 * math.pi * (x[:, None, :] * self.weight.to(x.dtype)).sum(-1)
        return torch.cat((f.cos(), f.sin()), dim=-1)


class HDiTFeedForward(nn.Module):
    """`(..., D) -> (..., D)`: GEGLU, the last projection zero at the start."""

    def __init__(self, dim: int, ff_dim: int, dropout: float = 0.0):
        super().__init__()
        self.up_proj = Linear(dim, 2 * ff_dim)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = zero_init(Linear(ff_dim, dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.dropout(geglu(self.up_proj(hidden_states))))


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale. Statistics in float32 (nn.RMSNorm warns when autocast mixes its dtypes)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype))


class HDiTMappingBlock(nn.Module):
    def __init__(self, dim: int, ff_dim: int, dropout: float):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.ff = HDiTFeedForward(dim, ff_dim, dropout)

    def forward(self, cond: Tensor) -> Tensor:
        return cond + self.ff(self.norm(cond))


class HDiTMappingNetwork(nn.Module):
    """`(B, M) -> (B, M)`, the residual mapping network in front of all adaptive norms."""

    def __init__(self, depth: int, dim: int, ff_dim: int, dropout: float):
        super().__init__()
        self.norm_in = RMSNorm(dim)
        self.blocks = nn.ModuleList([HDiTMappingBlock(dim, ff_dim, dropout) for _ in range(depth)])
        self.norm_out = RMSNorm(dim)

    def forward(self, cond: Tensor) -> Tensor:
        cond = self.norm_in(cond)
        for block in self.blocks:
            cond = block(cond)
        return self.norm_out(cond)


class HDiTConditioning(nn.Module):
    """Embeds and sums everything that conditions a sample, and maps the sum: `(B, M)`."""

    def __init__(self, dim, num_classes, augment_cond_dim, mapping_cond_dim, mapping: HDiTMappingNetwork):
        super().__init__()
        self.num_classes, self.augment_cond_dim, self.mapping_cond_dim = (
            num_classes,
            augment_cond_dim,
            mapping_cond_dim,
        )
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
        check_class_labels(class_labels, batch, self.num_classes)
        check_vector("augment_cond", augment_cond, batch, self.augment_cond_dim)
        check_vector("mapping_cond", mapping_cond, batch, self.mapping_cond_dim)
        cond = self.time_embedder(self.time_proj(timestep[:, None]).to(dtype))
        if self.augment_proj is not None:
            if augment_cond is None:
                augment_cond = timestep.new_zeros(batch, self.augment_cond_dim)
            cond = cond + self.augment_embedder(self.augment_proj(augment_cond.to(timestep.dtype)).to(dtype))
        if self.class_embedder is not None:
            if class_labels is None:
                class_labels = torch.full((batch,), self.num_classes, device=timestep.device)
            cond = cond + self.class_embedder(class_labels)
        if self.mapping_cond_embedder is not None and mapping_cond is not None:
            cond = cond + self.mapping_cond_embedder(mapping_cond.to(dtype))
        return self.mapping(cond)


class AdaRMSNorm(nn.Module):
    """RMSNorm of `(B, h, w, D)` whose scale is 1 + a linear map of the conditioning `(B, M)`; statistics in float32."""

    def __init__(self, dim: int, cond_dim: int):
        super().__init__()
        self.linear = zero_init(Linear(cond_dim, dim))

    def forward(self, hidden_states: Tensor, cond: Tensor) -> Tensor:
        return rms_norm(hidden_states, 1 + self.linear(cond))


def zero_init(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    return linear


# ----------------------------------------------------------------------------------------------------------------------
# Attention kinds: which tokens see each other.


class GlobalAttention(CosineAttention):
    """Every token sees every token of its level."""

    def query_key_pairs(self, height: int, width: int) -> int:
        return (height * width) ** 2

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return whole_grid_attention(query, key, value, scale=1.0)


class NeighborhoodAttention(CosineAttention):
    """Every token sees the kernel_size × kernel_size tokens around it (see `neighborhood.py`)."""

    def __init__(self, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.backend = "auto"

    def query_key_pairs(self, height: int, width: int) -> int:
        return height * width * self.kernel_size**2

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: Tensor, rotary) -> Tensor:
        # Some kernels scale and rotate queries and keys as they load them.
        return cosine_neighborhood_attention(query, key, value, self.kernel_size, scale, rotary, self.backend)


class ShiftedWindowAttention(CosineAttention):
    """Attention inside windows of a grid that is rolled by `shift` (Liu et al. 2021, arXiv 2103.14030)."""

    def __init__(self, window_size: int, shift: int):
        super().__init__()
        self.window_size, self.shift = window_size, shift

    def query_key_pairs(self, height: int, width: int) -> int:
        return height * width * self.window_size**2

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, height, width, heads, dim = query.shape
        size = self.window_size
        rows, columns = height // size, width // size

        def to_windows(x: Tensor) -> Tensor:
            x = x.roll((self.shift, self.shift), (1, 2)) if self.shift else x
            x = x.reshape(batch, rows, size, columns, size, heads, dim).permute(1, 3, 0, 5, 2, 4, 6)
            return x.reshape(rows * columns, batch * heads, size * size, dim)

        mask = self.same_side(height, width, query.device) if self.shift else None
        out = F.scaled_dot_product_attention(*map(to_windows, (query, key, value)), attn_mask=mask, scale=1.0)
        out = out.reshape(rows, columns, batch, heads, size, size, dim).permute(2, 0, 4, 1, 5, 3, 6)
        out = out.reshape(batch, height, width, heads, dim)
        return out.roll((-self.shift, -self.shift), (1, 2)) if self.shift else out

    def same_side(self, height: int, width: int, device: torch.device) -> Tensor:
        """Mask `(windows, 1, s², s²)`: tokens brought together by the roll, but apart in the image, do not see each other."""
        size = self.window_size
        wrapped_rows = torch.arange(height, device=device) < self.shift
        wrapped_columns = torch.arange(width, device=device) < self.shift
        side = 2 * wrapped_rows[:, None].int() + wrapped_columns[None].int()
        side = side.reshape(height // size, size, width // size, size).transpose(1, 2).reshape(-1, 1, size * size)
        return side[..., :, None] == side[..., None, :]


def make_attention_kind(attention_type: str, kernel_size: int, window_size: int, index: int) -> CosineAttention:
    """`index`: number of the block in its level, counting on through the up path; every second one is shifted."""
    if attention_type == "neighborhood":
        return NeighborhoodAttention(kernel_size)
    if attention_type == "shifted_window":
        return ShiftedWindowAttention(window_size, shift=window_size // 2 if index % 2 else 0)
    if attention_type == "sliding_window":
        return SlidingWindowAttention(kernel_size)
    return AxialAttention() if attention_type == "axial" else GlobalAttention()


# ----------------------------------------------------------------------------------------------------------------------
# A block

NORMS = {"ada_rms_norm": AdaRMSNorm, "ada_layer_norm": AdaLayerNorm}
FEED_FORWARDS = {"geglu": HDiTFeedForward, "gelu": GELUFeedForward}


class HDiTAttention(nn.Module):
    """Cosine-similarity attention with axial rotary embeddings, `(B, h, w, D) -> (B, h, w, D)`."""

    def __init__(self, dim: int, head_dim: int, kind: CosineAttention, dropout: float):
        super().__init__()
        self.head_dim = head_dim
        self.kind = kind
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.scale = nn.Parameter(torch.full((dim // head_dim,), 10.0))
        self.dropout = nn.Dropout(dropout)
        # A list of one: the LoRA configurations that people have for Diffusers' attention name this layer `to_out.0`.
        self.to_out = nn.ModuleList([zero_init(Linear(dim, dim))])

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        heads = (-1, self.head_dim)
        query, key, value = (layer(hidden_states).unflatten(-1, heads) for layer in (self.to_q, self.to_k, self.to_v))
        out = self.kind(query, key, value, self.scale, rotary)
        return self.to_out[0](self.dropout(out.flatten(-2)))


class HDiTTransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind an adaptive norm and around a residual."""

    def __init__(self, level: Level, cond_dim: int, index: int):
        super().__init__()
        kind = make_attention_kind(level.type, level.kernel_size, level.window_size, index)
        self.norm1 = NORMS[level.norm](level.width, cond_dim)
        self.attn = HDiTAttention(level.width, level.head_dim, kind, level.dropout)
        self.norm2 = NORMS[level.norm](level.width, cond_dim)
        self.ff = FEED_FORWARDS[level.activation](level.width, level.ff_width, level.dropout)

    def forward(self, hidden_states: Tensor, cond: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states, cond), rotary)
        return hidden_states + self.ff(self.norm2(hidden_states, cond))


class HDiTFeedForwardBlock(nn.Module):
    """A block of a level whose attention type is "none"."""

    def __init__(self, level: Level, cond_dim: int, index: int):
        super().__init__()
        self.norm2 = NORMS[level.norm](level.width, cond_dim)
        self.ff = FEED_FORWARDS[level.activation](level.width, level.ff_width, level.dropout)

    def forward(self, hidden_states: Tensor, cond: Tensor, rotary: None = None) -> Tensor:
        return hidden_states + self.ff(self.norm2(hidden_states, cond))


def make_blocks(level: Level, cond_dim: int, first_index: int = 0) -> nn.ModuleList:
    """The blocks of a level on one of its two ways; `first_index` is the number of the first one in its level."""
    block = HDiTFeedForwardBlock if level.type == "none" else HDiTTransformerBlock
    return nn.ModuleList([block(level, cond_dim, first_index + i) for i in range(level.depth)])


# ----------------------------------------------------------------------------------------------------------------------
# Between levels


class TokenMerge(nn.Module):
    """`(B, p·h, q·w, D) -> (B, h, w, D')`: a patch of p×q tokens, in the order (row, column, channel), becomes one token."""

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
    """`(B, h, w, D) -> (B, p·h, q·w, D')`, the way back."""

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
    """TokenSplit whose result is mixed with the skip by one learned factor."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


def make_split(skip: str, in_features: int, out_features: int) -> nn.Module:
    if skip == "lerp":
        return TokenSplitWithSkip(in_features, out_features)
    split = TokenSplit(in_features, out_features)
    return SplitAndAdd(split, out_features) if skip == "add" else SplitAndConcat(split, out_features)


# ----------------------------------------------------------------------------------------------------------------------
# The network


class HDiTModel(CarriesCode, SafeWeights, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    r"""
    The Hourglass Diffusion Transformer: a transformer in the shape of a U-Net that denoises images in pixel space.

    Levels are listed from the outermost to the innermost; `depths=(2, 2, 4)` means 2 + 2 + 4 + 2 + 2 blocks. Arguments
    that are given as one value hold for every level; a list has one entry a level.

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
        position_embedding (`str`): "rope"; "additive", learned vectors that are added to the outermost tokens, resampled
            for sizes other than sample_size; or "none".
        skip (`str`): how a skip meets what comes up: "lerp", "add" or "concat" (and a linear map back to the width).
        activation (`str`): "geglu" or "gelu" in the feed-forwards of the blocks; the mapping network has GEGLU always.
        norm (`str`): "ada_rms_norm" or "ada_layer_norm" in the blocks.
        self_conditioning (`bool`): whether the network also sees an earlier estimate of the clean image (Chen et al. 2022,
            arXiv 2208.04202), as `self_cond`.
        position_size (`int` or `(int, int)`, *optional*): see `set_position_size`.

    `position_embedding`, `skip`, `activation`, `norm`, `self_conditioning`, "axial" and "sliding_window" are for
    ablations (see `ablations.py`); the defaults are the paper's.

    Raises:
        ValueError: for lists of different lengths, unknown attention types, and sizes that do not fit each other; for
            unknown parts, and those of which the model has none (skips between the levels of a model of one level).
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
        depths: Sequence[int] = (2, 2, 4),
        ff_widths: Sequence[int] | None = None,
        attention_types: Sequence[str] | None = None,
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
        self.levels = resolve_levels(
            widths,
            depths,
            ff_widths,
            attention_types,
            attention_head_dim,
            kernel_size,
            window_size,
            dropout,
            position_embedding,
            activation,
            norm,
        )
        check_parts(
            self.levels,
            position_embedding=position_embedding,
            skip=skip,
            activation=activation,
            norm=norm,
            self_conditioning=self_conditioning,
        )
        self.patch_size = pair("patch_size", patch_size)
        for name, value in (
            ("in_channels", in_channels),
            ("mapping_width", mapping_width),
            ("num_classes", num_classes),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if conditioning_channels < 0:
            raise ValueError(f"conditioning_channels must not be negative, got {conditioning_channels}.")
        if self_conditioning and out_channels not in (None, in_channels):
            raise ValueError(
                "self_conditioning=True shows the network its own output, which must then be an image like its input; got "
                f"in_channels={in_channels}, out_channels={out_channels}. Leave out_channels out."
            )
        if mapping_width % 2:
            raise ValueError(f"mapping_width must be even (half cosines, half sines), got {mapping_width}.")
        self.sample_size = pair("sample_size", sample_size)
        self.check_size(*self.sample_size)

        outermost = self.levels[0].width
        channels = in_channels + conditioning_channels + (in_channels if self_conditioning else 0)
        self.patch_in = TokenMerge(channels, outermost, self.patch_size)
        if position_embedding == "additive":
            grid = (size // patch for size, patch in zip(self.sample_size, self.patch_size, strict=True))
            self.patch_in = PatchInWithPositions(self.patch_in, *grid, outermost)
        mapping = HDiTMappingNetwork(
            mapping_depth, mapping_width, mapping_ff_width or 3 * mapping_width, mapping_dropout
        )
        self.conditioning = HDiTConditioning(mapping_width, num_classes, augment_cond_dim, mapping_cond_dim, mapping)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.merges, self.splits = nn.ModuleList(), nn.ModuleList()
        for level, inner in zip(self.levels[:-1], self.levels[1:], strict=True):
            self.down_blocks.append(make_blocks(level, mapping_width))
            self.merges.append(TokenMerge(level.width, inner.width))
            self.splits.append(make_split(skip, inner.width, level.width))
            self.up_blocks.append(make_blocks(level, mapping_width, first_index=level.depth))
        self.transformer_blocks = make_blocks(self.levels[-1], mapping_width)

        self.set_position_size(position_size)

        self.norm_out = RMSNorm(outermost)
        self.patch_out = TokenSplit(outermost, out_channels or in_channels, self.patch_size)
        zero_init(self.patch_out.proj)
        self.gradient_checkpointing = False
        self.checkpointed_levels = frozenset(range(len(self.levels)))

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
    ) -> HDiTModelOutput | tuple[Tensor]:
        """
        Args:
            sample (`(B, C, H, W)`): noised image, already multiplied by c_in.
            timestep (number or `(B,)`): c_noise = ln(sigma) / 4, what Diffusers' EDM schedulers hand over.
            class_labels (`(B,)` int64, *optional*): `num_classes` or None mean "no label".
            augment_cond (`(B, augment_cond_dim)`, *optional*): zeros (not augmented) if not given.
            mapping_cond (`(B, mapping_cond_dim)`, *optional*): adds nothing if not given.
            conditioning_image (`(B, conditioning_channels, H, W)`): for a model with conditioning_channels, which needs
                it; of the sample's size, at unit scale whatever the noise level.
            self_cond (`(B, C, H, W)`, *optional*): for a model with self_conditioning: an earlier estimate of the clean
                image, the denoised image D as it is: in the images' units, [-1, 1] or a little more, not multiplied by
                c_in. Zeros mean that there is none, as if not given.

        Returns:
            F, the raw network output, `(B, out_channels, H, W)` in the model's dtype.

        Raises:
            ValueError: for sizes that do not fit (naming the nearest that do) and conditions of a wrong shape.
        """
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample must have shape (batch, {self.config.in_channels}, height, width), got {tuple(sample.shape)}."
            )
        self.check_size(*sample.shape[-2:])
        dtype = self.dtype
        images = self.join_images(sample, conditioning_image, self_cond)
        hidden_states = self.patch_in(images.to(dtype).permute(0, 2, 3, 1))

        timestep = torch.as_tensor(timestep, dtype=torch.promote_types(dtype, torch.float32), device=sample.device)
        timestep = timestep.expand(sample.shape[0])
        cond = self.conditioning(timestep, class_labels, augment_cond, mapping_cond, dtype)
        rotaries = self.rotary_tables(*hidden_states.shape[1:3], sample)

        skips = []
        for i in range(len(self.down_blocks)):
            hidden_states = self.run_level(i, self.down_blocks[i], hidden_states, cond, rotaries[i])
            skips.append(hidden_states)
            hidden_states = self.merges[i](hidden_states)

        hidden_states = self.run_level(len(skips), self.transformer_blocks, hidden_states, cond, rotaries[-1])

        for i in reversed(range(len(self.up_blocks))):
            hidden_states = self.splits[i](hidden_states, skips[i])
            hidden_states = self.run_level(i, self.up_blocks[i], hidden_states, cond, rotaries[i])

        output = self.patch_out(self.norm_out(hidden_states)).permute(0, 3, 1, 2).contiguous()
        return HDiTModelOutput(sample=output) if return_dict else (output,)

    def run_level(self, level: int, blocks: nn.ModuleList, hidden_states: Tensor, cond: Tensor, rotary) -> Tensor:
        recompute = self.gradient_checkpointing and level in self.checkpointed_levels and torch.is_grad_enabled()
        for block in blocks:
            if recompute:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, cond, rotary)
            else:
                hidden_states = block(hidden_states, cond, rotary)
        return hidden_states

    def rotary_tables(self, height: int, width: int, like: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """One pair of tables a level, for outermost tokens height × width; None for a level that rotates nothing."""
        heads = tuple((level.heads, level.head_dim) if level.heads and level.rotary else None for level in self.levels)
        return plan(hourglass_rotary_tables, like, height, width, self.tokens_across, heads, like.device)

    @property
    def size_rule(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What height and width in pixels must be multiples of, and their least values; (height, width) each."""
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
        """Raises ValueError unless images of height × width pixels fit all levels."""
        problems = []
        for name, size, divisor, smallest in zip(("height", "width"), (height, width), *self.size_rule, strict=True):
            if size % divisor or size < smallest:
                below, above = size // divisor * divisor, -(-size // divisor) * divisor
                nearest = sorted({max(below, smallest), max(above, smallest)})
                problems.append(
                    f"{name} {size} must be a multiple of {divisor} (patch, levels and windows) and at least {smallest} "
                    f"(neighborhoods must fit their level); the nearest that works: {' or '.join(map(str, nearest))}"
                )
        if problems:
            raise ValueError(f"This model can't process {height}×{width} images: {'; '.join(problems)}.")

    def set_position_size(self, size: int | tuple[int, int] | None) -> None:
        """
        Where the tokens of an image of another size than the trained one are. It is part of the saved configuration.

        Args:
            size: None (the paper's): every image fills [-1, 1], so that larger ones have their tokens closer together.
                A number of pixels, or (height, width): images of that size fill [-1, 1], and all others keep its spacing,
                so that larger ones reach further out. Additive positions know the spacing of `sample_size` only; outside
                of it, where nothing was learned, they are those of the nearest token of its border.

        Raises:
            ValueError: for a model without positions, and for another size than `sample_size` with additive ones.
        """
        additive = isinstance(self.patch_in, PatchInWithPositions)
        rotary = any(level.heads and level.rotary for level in self.levels)
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
        Recomputes only these levels' blocks in the backward pass (0 is the outermost, where most of the memory goes);
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

    def join_images(self, sample: Tensor, conditioning_image: Tensor | None, self_cond: Tensor | None) -> Tensor:
        """What the patches are cut from: the sample's channels, then those of the images that a model takes besides."""
        check_conditioning_image(sample, conditioning_image, self.config.conditioning_channels)
        self.check_self_cond(sample, self_cond)
        if self.config.self_conditioning and self_cond is None:
            self_cond = torch.zeros_like(sample)
        besides = [image.to(self.dtype) for image in (conditioning_image, self_cond) if image is not None]
        return torch.cat((sample.to(self.dtype), *besides), dim=1) if besides else sample

    def check_self_cond(self, sample: Tensor, self_cond: Tensor | None) -> None:
        if self_cond is None:
            return
        if not self.config.self_conditioning:
            raise ValueError(
                "self_cond was given, but this model has self_conditioning=False: it takes no earlier estimate. Leave it "
                "out, or train a model that is made with self_conditioning=True."
            )
        if self_cond.shape != sample.shape:
            raise ValueError(
                f"self_cond must have the shape of the sample, {tuple(sample.shape)}, got {tuple(self_cond.shape)}."
            )

    def enable_cache(self, config) -> None:
        """
        Caches what the middle level computes, by one of Diffusers' methods (`FirstBlockCacheConfig`,
        `TaylorSeerCacheConfig`, ...), for the steps of a pipeline. The outer levels always run.

        Raises:
            ValueError: for a middle level of fewer than two blocks, which has nothing to skip.
        """
        # Not at import: this makes Diffusers import all of its transformers.
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        if len(self.transformer_blocks) < 2:
            raise ValueError(
                f"the middle level has {len(self.transformer_blocks)} blocks; caching needs two or more, because the "
                "first one always runs."
            )
        metadata = TransformerBlockMetadata(return_hidden_states_index=0)
        TransformerBlockRegistry.register(type(self.transformer_blocks[0]), metadata)
        super().enable_cache(config)

    def set_neighborhood_backend(self, backend: str) -> None:
        """
        Chooses the kernel of all neighborhood levels: "auto" ("natten" or "cpp" where they work, else "tiled"), "natten",
        "triton", "cpp", "tiled", "flex" or "dense". All are exact; the choice can be changed at any time.

        Raises:
            ValueError: for an unknown name, or one that can't work on this model's device and dtype.
        """
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}; got {backend!r}.")
        levels = [level for level in self.levels if level.type == "neighborhood"]
        for level in levels if backend != "auto" else ():
            reason = unavailable_reason(
                backend, device=self.device, dtype=self.dtype, head_dim=level.head_dim, training=False
            )
            if reason:
                raise ValueError(reason)
        for module in self.modules():
            if isinstance(module, NeighborhoodAttention):
                module.backend = backend


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """What `from_pretrained(torch_dtype=dtype)` does: parameters are cast, the fixed Fourier projections are not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
