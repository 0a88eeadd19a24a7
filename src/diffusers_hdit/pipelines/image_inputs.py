"""Convert images and masks of several types to tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image] | Sequence[np.ndarray] | Sequence[Tensor]


def images_to_tensor(images: Images, channels: int, name: str = "image") -> Tensor:
    """
    Convert images to one tensor.

    Args:
        images: one or a list: PIL images; arrays `(H, W, C)` or tensors `(C, H, W)`, or with a batch in front, from 0 to 1.

    Returns:
        `(B, C, H, W)` float32 in [-1, 1].

    Raises:
        ValueError: for images of different sizes, of other channels than the model's, or outside of [0, 1].
    """
    batches = [_to_batch(image, name) for image in (images if isinstance(images, (list, tuple)) else [images])]
    shapes = {tuple(batch.shape[1:]) for batch in batches}
    if len(shapes) != 1:
        raise ValueError(
            f"all of {name} must have one shape; got {sorted(shapes) or 'none'} (channels, height, width)."
        )
    batch = torch.cat(batches)
    if batch.shape[1] != channels:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
        advice = f" Convert it, for instance with PIL: image.convert({mode!r})." if mode else ""
        raise ValueError(f"{name} has {batch.shape[1]} channels, this model takes {channels}.{advice}")
    low, high = batch.min().item(), batch.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{name} must have values from 0 to 1, got {low:.4g} to {high:.4g}.")
    return 2 * batch - 1


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
