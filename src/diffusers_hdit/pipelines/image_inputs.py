"""Convert images and masks of several types to tensors."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.utils import logging
from PIL import Image
from torch import Tensor


logger = logging.get_logger(__name__)

# The modes of images with 8 bits that PIL converts into each other, and what models of so many channels take.
_CONVERTIBLE = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image] | Sequence[np.ndarray] | Sequence[Tensor]


def images_to_tensor(images: Images, channels: int, name: str = "image") -> Tensor:
    """
    Convert images to one tensor.

    Args:
        images: one or a list: PIL images, which are converted to grey, RGB or RGBA as the model has 1, 3 or 4 channels;
            arrays `(H, W, C)` or tensors `(C, H, W)`, or with a batch in front, from 0 to 1.

    Returns:
        `(B, C, H, W)` float32 in [-1, 1].

    Raises:
        ValueError: for images of different sizes, of other channels than the model's, or outside of [0, 1].
    """
    images = images if isinstance(images, (list, tuple)) else [images]
    batches = [_to_batch(_in_mode(image, _MODES.get(channels)), name) for image in images]
    shapes = {tuple(batch.shape[1:]) for batch in batches}
    if len(shapes) != 1:
        raise ValueError(
            f"all of {name} must have one shape; got {sorted(shapes) or 'none'} (channels, height, width)."
        )
    batch = torch.cat(batches)
    if batch.shape[1] != channels:
        raise ValueError(f"{name} has {batch.shape[1]} channels, this model takes {channels}.")
    low, high = batch.min().item(), batch.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{name} must have values from 0 to 1, got {low:.4g} to {high:.4g}.")
    return 2 * batch - 1


def fit_to_model(image: Tensor, model: ModelMixin) -> Tensor:
    """Resize images `(B, C, H, W)` in [-1, 1] to the nearest size that the model takes, and say so; most need no change."""
    size = tuple(image.shape[-2:])
    if not hasattr(model, "size_rule"):
        return image
    fitting = tuple(
        max(divisor * max(1, round(length / divisor)), -(-least // divisor) * divisor)
        for length, divisor, least in zip(size, *model.size_rule, strict=True)
    )
    if fitting == size:
        return image
    logger.warning(
        f"Resized the image from {size[0]}×{size[1]} to {fitting[0]}×{fitting[1]} (height×width), the nearest size that this "
        "model takes."
    )
    return F.interpolate(image, fitting, mode="bicubic", antialias=True).clamp(-1, 1)


def mask_to_tensor(masks: Images, height: int, width: int) -> Tensor:
    """
    Convert masks to one tensor of booleans.

    Args:
        masks: as `images_to_tensor` takes them, of one channel or, for arrays and tensors, `(H, W)`; 0.5 and above
            (white) is what to generate.

    Returns:
        `(B, 1, H, W)` booleans.

    Raises:
        ValueError: for a size other than the image's.
    """
    masks = masks if isinstance(masks, (list, tuple)) else [masks]
    mask = images_to_tensor([_with_channel(mask) for mask in masks], 1, "mask_image") >= 0
    if tuple(mask.shape[-2:]) != (height, width):
        raise ValueError(
            f"mask_image must have the size of the image, {height}×{width} (height, width); got "
            f"{mask.shape[-2]}×{mask.shape[-1]}."
        )
    return mask


def _with_channel(mask: Image.Image | np.ndarray | Tensor) -> Image.Image | np.ndarray | Tensor:
    if isinstance(mask, Image.Image):
        return mask.convert("L")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[None]
    return mask[..., None] if isinstance(mask, np.ndarray) and mask.ndim == 2 else mask


def _in_mode(image: Image.Image | np.ndarray | Tensor, mode: str | None) -> Image.Image | np.ndarray | Tensor:
    is_other = isinstance(image, Image.Image) and mode and image.mode != mode
    return image.convert(mode) if is_other and image.mode in _CONVERTIBLE else image


def _to_batch(image: Image.Image | np.ndarray | Tensor, name: str) -> Tensor:
    """Return `(B, C, H, W)` in float32 with the image's own values; PIL's from 0 to 1."""
    if isinstance(image, Tensor):
        batch = image.float()
    elif isinstance(image, Image.Image):
        # Others may have as many channels, but of another meaning.
        if image.mode not in ("1", "L", "RGB", "RGBA"):
            raise ValueError(f"{name} has mode {image.mode}; convert it to L, RGB or RGBA.")
        array = np.asarray(image)
        scale = 255 if array.dtype == np.uint8 else 1
        batch = torch.from_numpy(array / np.float32(scale)).reshape(*array.shape[:2], -1).permute(2, 0, 1)
    elif isinstance(image, np.ndarray):
        batch = torch.from_numpy(image.astype(np.float32)).movedim(-1, -3)
    else:
        raise ValueError(f"{name} must be PIL images, arrays or tensors, got {type(image).__name__}.")
    if batch.ndim not in (3, 4):
        raise ValueError(f"{name} must have 3 or 4 dimensions, got {tuple(image.shape)}.")
    return batch if batch.ndim == 4 else batch[None]
