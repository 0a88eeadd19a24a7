"""Super-resolution: what a network that upscales sees besides the noised image, in training and in sampling.

The low-resolution image, resized to the size of the result, gets Gaussian noise of a random level, and the
network is told the level ("conditioning augmentation", Ho et al. 2021, "Cascaded Diffusion Models", arXiv 2106.15282, in
the variance-preserving form of Saharia et al. 2022, "Imagen", arXiv 2205.11487). So it does not rely on
the finest detail of its input, which at sampling may come from another camera or from another model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conditioning_channels(image_channels: int) -> int:
    """Return the `conditioning_channels` of `HDiTModel`: those of the low-resolution image, and one of its noise level."""
    return image_channels + 1


def downscale(image: Tensor, factor: int) -> Tensor:
    """
    Downscale `(B, C, H, W)` to `(B, C, H / factor, W / factor)`, both in [-1, 1]: bicubic with antialiasing, as most sets
    of small images were made, rounded to the 256 values of a stored image.

    Raises:
        ValueError: for a size that the factor does not divide.
    """
    height, width = image.shape[-2:]
    if factor < 2 or height % factor or width % factor:
        raise ValueError(
            f"the upscale factor must be at least 2 and divide the image; got {factor} for {height}×{width} pixels."
        )
    low_res_image = F.interpolate(
        image.float(), size=(height // factor, width // factor), mode="bicubic", antialias=True
    )
    return ((low_res_image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def conditioning_image(
    low_res_image: Tensor, factor: int, noise_level: Tensor | float, noise: Tensor | None = None
) -> Tensor:
    """
    Return the network's `conditioning_image`.

    Args:
        low_res_image: low-resolution images `(B, C, h, w)` in [-1, 1].
        noise_level: s in [0, 1], a number or `(B,)`; the resized image x becomes sqrt(1 - s²) x + s·noise.
        noise: unit-variance noise `(B, C, factor · h, factor · w)`; not needed if the level is the number 0.

    Returns:
        `(B, C + 1, factor · h, factor · w)` float32: the disturbed image, and the level in all of the last channel.
    """
    size = (factor * low_res_image.shape[-2], factor * low_res_image.shape[-1])
    image = F.interpolate(low_res_image.float(), size=size, mode="bicubic").clamp(-1, 1)
    level = torch.as_tensor(noise_level, dtype=image.dtype, device=image.device).expand(len(image))[
        :, None, None, None
    ]
    if noise is not None:
        image = (1 - level**2).sqrt() * image + level * noise
    elif not (isinstance(noise_level, (int, float)) and noise_level == 0):
        raise ValueError("noise is missing: only for the noise_level 0 it may be left out.")
    return torch.cat((image, level.expand(-1, 1, *size)), dim=1)


def training_conditioning(image: Tensor, factor: int, noise_level: Tensor, noise: Tensor) -> Tensor:
    """
    Return the `conditioning_image` of training images for `diffusion.loss`: downscaled, resized back, and with noise.

    Args:
        image: `(B, C, H, W)` in [-1, 1].
        noise_level: `(B,)`, sampled uniformly from 0 to the pipeline's max_noise_level.
        noise: unit-variance noise of the image's shape.

    Raises:
        ValueError: for a size that the factor does not divide.
    """
    return conditioning_image(downscale(image, factor), factor, noise_level, noise)


def check_noise_level(noise_level: float, highest: float) -> None:
    if not 0 <= noise_level <= highest:
        raise ValueError(f"noise_level must be from 0 to {highest}, got {noise_level}.")
