"""Pixel-space baselines for HDiT, built from Diffusers' DiT and U-Net and called exactly as `HDiTModel` is.

Both predict F of the EDM preconditioning (Karras et al. 2022, arXiv 2206.00364, equation 7) from the sample times c_in
and c_noise = ln(sigma)/4, so that loss, samplers, guidance and pipelines are those of HDiT; only the network differs.

Shapes: B batch, C channels, H×W pixels, E width of the embedding of everything that conditions a sample.
"""

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from ..utils.remote_code import RemoteCodeMixin, SafeWeights
from .checks import check_counts, check_inputs, check_types, pair


# The sinusoidal embeddings of both networks were designed for the whole numbers from 0 to 999: their fastest wave
# advances by one radian per unit. c_noise spans 3.5 units in all, over which most waves would hardly change. With this
# factor, sigma from 1e-3 to 1e3 spans 863 units, 0.6 for each percent of sigma.
TIME_SCALE = 250.0


class ConditionEmbedding(nn.Module):
    """
    Embed and sum everything but the noise level: `(B, E)`.

    The maps of augmentation and vector conditions are linear, without bias and zero at initialization, as the one for
    augmentation in Karras et al. 2022 (appendix F.2); conditions that are not given count as zeros.
    """

    def __init__(self, dim: int, num_classes: int | None, augment_cond_dim: int, mapping_cond_dim: int):
        super().__init__()
        self.dim, self.num_classes = dim, num_classes
        # One row more than there are classes: the last one means "no label".
        self.class_embedder = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.augment_embedder = zero_linear(augment_cond_dim, dim)
        self.mapping_cond_embedder = zero_linear(mapping_cond_dim, dim)

    def forward(
        self,
        sample: Tensor,
        class_labels: Tensor | None,
        augment_cond: Tensor | None,
        mapping_cond: Tensor | None,
    ) -> Tensor:
        """Return the embedding in the dtype and on the device of the `sample`."""
        batch = len(sample)
        temb = sample.new_zeros(batch, self.dim)
        if self.class_embedder is not None:
            if class_labels is None:
                class_labels = torch.full((batch,), self.num_classes, device=sample.device)
            temb = temb + self.class_embedder(class_labels)
        for embedder, value in ((self.augment_embedder, augment_cond), (self.mapping_cond_embedder, mapping_cond)):
            if embedder is not None:
                # Zeros are mapped too: parameters without a gradient would stop distributed training.
                value = sample.new_zeros(batch, embedder.in_features) if value is None else value.to(sample.dtype)
                temb = temb + embedder(value)
        return temb


def zero_linear(in_features: int, out_features: int) -> nn.Linear | None:
    if not in_features:
        return None
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


class PixelBaseline(RemoteCodeMixin, SafeWeights, ModelMixin, ConfigMixin):
    """
    The common base of the baselines: their `forward`, and what pipelines and training need of a network.

    A subclass makes `conditioning` and implements `predict(sample, time, temb)`.
    """

    _auto_class = "AutoModel"
    _supports_gradient_checkpointing = True
    # Diffusers' caches do not find the blocks of a network inside of a network.
    is_cache_enabled = False

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        augment_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
        conditioning_image: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        The arguments are those of `HDiTModel.forward`, without `self_cond`.

        Returns:
            F, the raw network output, `(B, out_channels, H, W)` in the model's dtype.

        Raises:
            ValueError: for sizes that do not fit (naming those that do) and conditions of a wrong shape.
        """
        check_inputs(self, sample, class_labels, augment_cond, mapping_cond, conditioning_image)
        dtype = self.dtype
        sample = sample.to(dtype)
        # In float32 or better, and never rounded to integers: that would merge neighbouring noise levels.
        timestep = torch.as_tensor(timestep, dtype=torch.promote_types(dtype, torch.float32), device=sample.device)
        temb = self.conditioning(sample, class_labels, augment_cond, mapping_cond)
        if conditioning_image is not None:
            sample = torch.cat((sample, conditioning_image.to(dtype)), dim=1)
        output = self.predict(sample, TIME_SCALE * timestep.expand(len(sample)), temb)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def set_gradient_checkpointing_levels(self, levels: Sequence[int]) -> None:
        """
        Recompute in the backward pass what Diffusers checkpoints in this network (the DiT's blocks, the U-Net's
        residual layers). A baseline has one level, 0; an empty list recomputes nothing.

        Raises:
            ValueError: for another level.
        """
        if not set(levels) <= {0}:
            raise ValueError(f"{type(self).__name__} has no levels to choose among; got {list(levels)}.")
        self.enable_gradient_checkpointing() if levels else self.disable_gradient_checkpointing()


# ----------------------------------------------------------------------------------------------------------------------
# The Diffusion Transformer


class GivenEmbedding(nn.Module):
    """Return the embedding that is computed once for all blocks, in place of a block's own embedding."""

    def forward(self, timestep: Tensor, class_labels: None = None, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return timestep.to(hidden_dtype)


class DiTPixelModel(PixelBaseline):
    r"""
    The plain Diffusion Transformer (Peebles & Xie 2023, arXiv 2212.09748), as Diffusers' `DiTTransformer2DModel`.

    As in the paper, noise level and class are embedded once for all blocks (in Diffusers' class each block has its own
    embedding, and its conversion script fills them with copies), and weights are initialized as in the paper's code,
    with adaptive norms, gates and the last layer at zero (Diffusers' class, made for inference, does not do that).
    Training drops labels, not the network, and the output has no channels for a learned variance, unused by EDM.

    Args:
        sample_size (`int` or `(int, int)`): height and width in pixels, equal; the network takes images of this size
            only, which its table of positions is made for.
        in_channels, out_channels, num_classes, augment_cond_dim, mapping_cond_dim, conditioning_channels: as in
            `HDiTModel`.
        patch_size (`int`): side in pixels of a token.
        num_layers, num_attention_heads, attention_head_dim: the defaults are those of DiT-S. The width, heads times
            dimension, is a multiple of 4.
        dropout (`float`): after attention and inside the feed-forwards.

    Raises:
        ValueError: for sizes that are not square or that the patch does not divide, and values out of range.
    """

    _no_split_modules = ["BasicTransformerBlock"]
    _repeated_blocks = ["BasicTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "time_embedder", "conditioning"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        dropout: float = 0.0,
        num_classes: int | None = None,
        augment_cond_dim: int = 9,
        mapping_cond_dim: int = 0,
        conditioning_channels: int = 0,
    ):
        super().__init__()
        check_types(self)
        check_counts(self.config, "patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
        self.sample_size = pair("sample_size", sample_size)
        height, width = self.sample_size
        if height != width or height % patch_size:
            raise ValueError(
                f"sample_size {height}×{width} must be square and a multiple of patch_size {patch_size}: the "
                "positions of DiTTransformer2DModel are those of a square grid. HDiTModel and UNetPixelModel take "
                "other shapes."
            )
        dim = num_attention_heads * attention_head_dim
        if dim % 4:
            raise ValueError(
                f"num_attention_heads {num_attention_heads} times attention_head_dim {attention_head_dim} is {dim}; "
                "it must be a multiple of 4 (sines and cosines of rows and of columns)."
            )
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.time_embedder = TimestepEmbedding(256, dim)
        self.conditioning = ConditionEmbedding(dim, num_classes, augment_cond_dim, mapping_cond_dim)
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels + conditioning_channels,
            out_channels=out_channels or in_channels,
            num_layers=num_layers,
            dropout=dropout,
            sample_size=height,
            patch_size=patch_size,
            num_embeds_ada_norm=1,  # of the embeddings that are replaced below
        )
        for block in self.transformer.transformer_blocks:
            block.norm1.emb = GivenEmbedding()
        self.initialize()

    def initialize(self) -> None:
        """Initialize the weights as the paper's code does (facebookresearch/DiT)."""
        for module in self.transformer.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for linear in (self.time_embedder.linear_1, self.time_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.conditioning.class_embedder is not None:
            nn.init.normal_(self.conditioning.class_embedder.weight, std=0.02)
        adaptive = [block.norm1.linear for block in self.transformer.transformer_blocks]
        for linear in (*adaptive, self.transformer.proj_out_1, self.transformer.proj_out_2):
            nn.init.zeros_(linear.weight)

    def predict(self, sample: Tensor, time: Tensor, temb: Tensor) -> Tensor:
        temb = temb + self.time_embedder(self.time_proj(time).to(temb.dtype))
        return self.transformer(sample, timestep=temb, return_dict=False)[0]

    @property
    def size_rule(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """As in `HDiTModel`; the only size is both the minimum and the divisor."""
        return self.sample_size, self.sample_size

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for all sizes but the one that the network was made for."""
        if (height, width) != self.sample_size:
            made_for = "×".join(map(str, self.sample_size))
            raise ValueError(
                f"this model can't process {height}×{width} images: a DiTPixelModel takes only the size that it was "
                f"made for, {made_for}."
            )


# ----------------------------------------------------------------------------------------------------------------------
# The U-Net


class UNetPixelModel(PixelBaseline):
    r"""
    The U-Net of Diffusers' example of unconditional image generation, `UNet2DModel`, a descendant of DDPM's (Ho et al.
    2020, arXiv 2006.11239). Weights are initialized as in Diffusers.

    Args:
        sample_size (`int` or `(int, int)`): height and width in pixels of the images the model is trained on. The
            network takes all sizes that can be halved between its blocks.
        in_channels, out_channels, num_classes, augment_cond_dim, mapping_cond_dim, conditioning_channels: as in
            `HDiTModel`.
        block_out_channels (`Sequence[int]`): channels of each block, from the outermost to the innermost, multiples of
            `norm_num_groups`; the default is the example's. Small images need fewer and narrower blocks.
        layers_per_block (`int`): residual layers of a block on the way down; one more on the way up.
        attention_blocks (`Sequence[int]`, *optional*): numbers of the blocks with attention, 0 the outermost. Default:
            the last but one, the example's fifth. The middle always has it.
        attention_head_dim (`int`): a divisor of the channels of the blocks with attention.
        norm_num_groups (`int`): groups of the group norms.
        dropout (`float`): in the residual layers.

    Raises:
        ValueError: for sizes and channels that do not fit, and values out of range.
    """

    _no_split_modules = ["DownBlock2D", "AttnDownBlock2D", "UNetMidBlock2D", "UpBlock2D", "AttnUpBlock2D"]
    _repeated_blocks = ["ResnetBlock2D"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "conditioning"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        out_channels: int | None = None,
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512, 512),
        layers_per_block: int = 2,
        attention_blocks: Sequence[int] | None = None,
        attention_head_dim: int = 8,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        num_classes: int | None = None,
        augment_cond_dim: int = 9,
        mapping_cond_dim: int = 0,
        conditioning_channels: int = 0,
    ):
        super().__init__()
        check_types(self)
        check_counts(self.config, "layers_per_block", "attention_head_dim", "norm_num_groups")
        count = len(block_out_channels)
        attention_blocks = [max(count - 2, 0)] if attention_blocks is None else attention_blocks
        check_blocks(block_out_channels, attention_blocks, attention_head_dim, norm_num_groups)
        self.sample_size = pair("sample_size", sample_size)
        self.divisor = 2 ** (count - 1)
        self.check_size(*self.sample_size)
        dim = 4 * block_out_channels[0]
        self.conditioning = ConditionEmbedding(dim, num_classes, augment_cond_dim, mapping_cond_dim)
        self.unet = UNet2DModel(
            sample_size=self.sample_size,
            in_channels=in_channels + conditioning_channels,
            out_channels=out_channels or in_channels,
            down_block_types=["AttnDownBlock2D" if i in attention_blocks else "DownBlock2D" for i in range(count)],
            up_block_types=["AttnUpBlock2D" if i in attention_blocks else "UpBlock2D" for i in reversed(range(count))],
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            time_embedding_dim=dim,
            class_embed_type="identity",  # `conditioning` is added to the time embedding as it is
        )

    def predict(self, sample: Tensor, time: Tensor, temb: Tensor) -> Tensor:
        return self.unet(sample, time, class_labels=temb, return_dict=False)[0]

    @property
    def size_rule(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """As in `HDiTModel`."""
        return (self.divisor, self.divisor), (self.divisor, self.divisor)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless images of height × width pixels can be halved between all blocks."""
        if height % self.divisor or width % self.divisor or min(height, width) < 1:
            nearest = "×".join(str(max(1, round(size / self.divisor)) * self.divisor) for size in (height, width))
            raise ValueError(
                f"This model can't process {height}×{width} images: both must be multiples of {self.divisor} (its "
                f"blocks halve them {int(math.log2(self.divisor))} times); the nearest that works: {nearest}. Or "
                "give it fewer block_out_channels."
            )


def check_blocks(
    block_out_channels: Sequence[int], attention_blocks: Sequence[int], attention_head_dim: int, norm_num_groups: int
) -> None:
    """Raise ValueError unless the channels of a U-Net's blocks fit their norms and their attention."""
    channels = list(block_out_channels)
    if not channels or any(width < 1 or width % norm_num_groups for width in channels):
        raise ValueError(
            f"block_out_channels must be one or more multiples of norm_num_groups {norm_num_groups}, got {channels}."
        )
    if not set(attention_blocks) <= set(range(len(channels))):
        raise ValueError(
            f"attention_blocks must be of 0 to {len(channels) - 1}, the blocks of block_out_channels; got "
            f"{list(attention_blocks)}."
        )
    attending = {channels[i] for i in attention_blocks} | {channels[-1]}
    if any(width % attention_head_dim for width in attending):
        raise ValueError(
            f"attention_head_dim {attention_head_dim} must divide the channels of the blocks with attention and of "
            f"the last one, {sorted(attending)}."
        )
