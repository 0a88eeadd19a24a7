"""Decode image files, scale and crop them with antialiasing, and convert their value ranges.

Pixels are a PIL image in mode L, RGB or RGBA, or, where PIL has no mode for them, an array of uint8, uint16 or float32.
Sizes are (height, width) in pixels; C is the number of channels.
"""

import io
import math
import os
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DTYPES = ("uint8", "uint16", "float32")
# The decoder or a box filter first reduces a much larger image to one that is still this many times too large. Lanczos
# hides the difference; PIL's own `thumbnail` has the same limit.
REDUCING_GAP = 2
LANCZOS_REACH = 3  # pixels of the result, to either side
# The EXIF orientation tag (274) -> what makes the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations with height and width exchanged
CONVERT = (
    "save it as .npy: uint8, uint16 or float32 in [-1, 1], of shape (height, width, channels) or "
    "(channels, height, width)"
)


class Decoded(NamedTuple):
    """Pixels, and their size (height, width) in the file; a JPEG may have been decoded at 1/2, 1/4 or 1/8 of it."""

    pixels: Image.Image | np.ndarray
    size: tuple[int, int]

    @property
    def content_type(self) -> str:
        """Return "image" for what PIL converts between grey, RGB and RGBA, else the dtype of the array."""
        return "image" if isinstance(self.pixels, Image.Image) else self.pixels.dtype.name


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


def decode(file, min_size: tuple[int, int] | None = None) -> Decoded:
    """
    Decode an image file and rotate it upright, or read an array from an .npy file.

    Of an animation, and of a .tif of several images, the first is read. A .tif of several grey pages of one size is
    an array with a channel for each page. 16-bit grey becomes a uint16 array, a floating-point image a float32 one.

    Args:
        file: a path or a binary file.
        min_size: (height, width) that the image will be scaled to cover; a JPEG is then decoded at the power of two
            that leaves it at least `REDUCING_GAP` times as large. None decodes all pixels.

    Raises:
        ValueError: pixels of a type or range that has no meaning here. Decoders raise OSError and others.
    """
    content_type = _type_of_file(file)
    if content_type == "npy":
        return decode_array(np.load(file, allow_pickle=False))
    if content_type == "tiff" and not isinstance(file, io.BytesIO):
        # Given the name of a file, Pillow (13.0) maps the stored pixels as if they were rotated upright already.
        with open(file, "rb") as opened:
            return _decode_image(opened, content_type, min_size)
    return _decode_image(file, content_type, min_size)


def _decode_image(file, content_type, min_size) -> Decoded:
    try:
        image = Image.open(file)
    except Image.UnidentifiedImageError as error:
        if content_type == "tiff":
            raise ValueError(f"PIL cannot read this kind of TIFF; {CONVERT}") from error
        raise
    with image:
        size = None
        if image.format in ("JPEG", "MPO"):
            # Only here is the orientation known before the pixels are.
            size = (image.width, image.height) if _orientation(image) in SIDEWAYS else (image.height, image.width)
            if min_size is not None:
                step = 2 ** _halvings(source_step(size, min_size))
                if step > 1:
                    image.draft(None, (image.width // step, image.height // step))
        elif image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            stacked = _stack_pages(image)
            if stacked is not None:
                return Decoded(stacked, stacked.shape[:2])
        image.load()
        transpose = UPRIGHT.get(_orientation(image))
        if image.mode == "F" or image.mode.startswith("I"):
            array = _checked_array(np.asarray(image))  # native-endian, which PIL transposes right
            array = array if transpose is None else np.asarray(Image.fromarray(array).transpose(transpose))
            return Decoded(array, array.shape)
        if image.has_transparency_data:
            mode = "RGBA"
        else:
            mode = "L" if image.mode in ("1", "L") else "RGB"
        pixels = image if image.mode == mode else image.convert(mode)
        pixels = pixels if transpose is None else pixels.transpose(transpose)
        size = size or (pixels.height, pixels.width)
    return Decoded(pixels, size)


def _orientation(image) -> int | None:
    try:
        return image.getexif().get(274)
    except Exception:  # broken EXIF says nothing against the pixels
        return None


def _type_of_file(file) -> str | None:
    """Return "npy" or "tiff", by the first bytes of what is in memory, by the name of what is not."""
    if isinstance(file, io.BytesIO):
        magic = bytes(file.getbuffer()[:6])
        npy, tiff = magic == b"\x93NUMPY", magic[:4] in (b"II*\0", b"MM\0*")
    else:
        name = os.fsdecode(file).lower()
        npy, tiff = name.endswith(".npy"), name.endswith((".tif", ".tiff"))
    return "npy" if npy else "tiff" if tiff else None


def decode_array(array: np.ndarray) -> Decoded:
    """Return an array (H, W), (H, W, C) or (C, H, W) as a decoded image; ValueError if it has no such meaning."""
    array = _checked_array(array)
    if array.ndim not in (2, 3):
        raise ValueError(f"the array has shape {array.shape}; {CONVERT}")
    return Decoded(array, array.shape[:2])


def _stack_pages(image) -> np.ndarray | None:
    """Return grey pages of one size as the channels of an array (H, W, C); None for pages that are images of their own."""
    pages = []
    for page in range(image.n_frames):
        image.seek(page)
        if (
            image.mode == "P"
            or len(image.getbands()) != 1
            or (pages and (image.height, image.width) != pages[0].shape)
        ):
            image.seek(0)
            return None
        pages.append(_checked_array(np.asarray(image)))
    return np.stack(pages, axis=2)


def _checked_array(array: np.ndarray) -> np.ndarray:
    """Return the array as uint8, uint16 or float32; ValueError for values that have no meaning as pixels."""
    if array.size == 0:
        raise ValueError(f"the array is empty: shape {array.shape}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -1 and high <= 1):  # also NaN
            raise ValueError(f"floating-point pixels must lie in [-1, 1], but go from {low} to {high}; scale them")
        return array.astype(np.float32)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind in "iu" and array.dtype.itemsize >= 2:
        low, high = int(array.min()), int(array.max())
        if low >= 0 and high <= 65535:  # PIL's mode I, whose integers are signed whatever the file says
            return array.astype(np.uint16)
        raise ValueError(f"integer pixels from {low} to {high}, not within 16 bits; {CONVERT}")
    raise ValueError(f"pixels of type {array.dtype}; {CONVERT}")


# ----------------------------------------------------------------------------------------------------------------------
# One number of channels, one type


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a mode, laying it on white if it has transparency that the mode lacks."""
    if image.mode == "RGBA" and mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def channel_layout(shape: tuple[int, ...], channels: int) -> str | None:
    """Return how an array holds C channels: "grey" (H, W), "last" (H, W, C), "first" (C, H, W), or None: it doesn't."""
    if len(shape) == 2:
        return "grey" if channels in MODES else None
    if shape[2] == channels:
        return "last"
    return "first" if shape[0] == channels else None


def array_size(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    """Return (height, width) of an array of this layout."""
    return (shape[1], shape[2]) if layout == "first" else (shape[0], shape[1])


def locate_channels(decoded: Decoded, channels: int) -> Decoded:
    """Correct the size of an array whose C channels may come first or last."""
    if decoded.content_type == "image":
        return decoded
    shape = decoded.pixels.shape
    return decoded._replace(size=array_size(shape, channel_layout(shape, channels) or "last"))


def dtype_for(content_type: str, shape: tuple[int, ...], channels: int) -> str:
    """Return the type that keeps what an image or array holds; only one-channel models keep 16 bits of grey."""
    if content_type == "image" or (content_type == "uint16" and len(shape) == 2 and channels != 1):
        return "uint8"
    return content_type


def to_channels(pixels: Image.Image | np.ndarray, channels: int, dtype: str) -> Image.Image | np.ndarray:
    """Convert to a PIL image of `channels` bands if dtype is uint8 and PIL has such a mode, else to (H, W, C) of dtype."""
    if isinstance(pixels, np.ndarray):
        layout = channel_layout(pixels.shape, channels)
        if layout is None:
            raise ValueError(f"an array of shape {pixels.shape} has not {channels} channels")
        if layout != "grey":
            array = pixels.transpose(1, 2, 0) if layout == "first" else pixels
            return _as_dtype(array, dtype)
        if dtype != "uint8":
            return _as_dtype(np.repeat(pixels[:, :, None], channels, axis=2), dtype)
        pixels = Image.fromarray(np.ascontiguousarray(_as_dtype(pixels, "uint8")))
    image = to_mode(pixels, MODES[channels])
    if dtype == "uint8":
        return image
    return _as_dtype(np.asarray(image).reshape(image.height, image.width, channels), dtype)


def _as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    if dtype == "uint8" and array.dtype == np.uint16:  # 0..65535 -> 0..255, rounded
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if dtype == "uint16" and array.dtype == np.uint8:
        return array.astype(np.uint16) * 257
    raise ValueError(f"pixels of type {array.dtype} among images of type {dtype}")


# ----------------------------------------------------------------------------------------------------------------------
# Scaling and cropping


def source_step(size: tuple[int, int], target: tuple[int, int]) -> float:
    """
    Return how many pixels of an image make one of the result, when the image is scaled to cover `target`.

    It is rounded down (by less than 1/2048 in images of less than 8192 pixels) until its multiples within the image
    are exact in float32, the type of PIL's boxes. Resizing a box then gives, to the last bit, what resizing the whole
    image and cropping gives, so that a cache of whole scaled images changes no pixel.
    """
    step = min(size[0] / target[0], size[1] / target[1])
    # 24 bits in a float32. The smallest unit must also leave room for multiples of up to the longer side.
    unit = 2.0 ** (max(max(size).bit_length(), 1) - 24)
    return max(1.0, math.floor(step / unit)) * unit


def cover_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width), in whole pixels, of an image of `size` that is scaled to cover `target`."""
    step = source_step(size, target)
    return max(target[0], math.floor(size[0] / step)), max(target[1], math.floor(size[1] / step))


def crop_offset(cover: tuple[int, int], target: tuple[int, int], crop: tuple[float, float]) -> tuple[int, int]:
    """Return (top, left) of a crop, in pixels of the scaled image; `crop` (y, x) goes from 0 (top, left) to 1."""
    return tuple(
        min(int(at * (n - wanted + 1)), n - wanted) for at, n, wanted in zip(crop, cover, target, strict=True)
    )


def _halvings(step: float) -> int:
    """Return how often an image may be halved before Lanczos scales it."""
    return max(0, math.floor(math.log2(step / REDUCING_GAP))) if step > 0 else 0


def scale(
    pixels: Image.Image | np.ndarray, size: tuple[int, int], target: tuple[int, int], window: tuple[int, int, int, int]
) -> np.ndarray:
    """
    Scale an image to cover `target`, antialiased (Lanczos), and return a window of it, (C, H, W).

    Args:
        pixels: as `to_channels` returns them; perhaps decoded smaller than they are in the file.
        size: (height, width) in the file.
        target: (height, width) to be covered.
        window: (top, left, height, width) in pixels of the scaled image.
    """
    step = source_step(size, target)
    is_image = isinstance(pixels, Image.Image)
    have = pixels.height if is_image else pixels.shape[0]
    # A power of two, so that steps stay exact.
    done = 2 ** round(math.log2(size[0] / have)) if have != size[0] else 1
    if is_image:
        more = 2 ** _halvings(step / done)
        if more > 1:
            pixels, done = pixels.reduce(more), done * more
        array = np.asarray(_resized(pixels, window, step / done))
        return np.array(array.reshape(*window[2:], -1).transpose(2, 0, 1), order="C")
    if step == 1:
        top, left, height, width = window
        return np.array(pixels[top : top + height, left : left + width].transpose(2, 0, 1), order="C")
    return np.stack([_scale_plane(pixels[:, :, c], window, step) for c in range(pixels.shape[2])])


def _resized(image: Image.Image, window, step: float) -> Image.Image:
    """
    Resize so that `step` pixels of the image become one, and return the window (top, left, height, width) of it.

    Rows are scaled first, then columns. PIL would choose by the window's size, and it rounds in between, so that a
    window would differ from the same window of the whole image.
    """
    top, left, height, width = window
    reach = LANCZOS_REACH * max(1, step) + 1
    first = max(0, math.floor(top * step - reach))
    last = min(image.height, math.ceil((top + height) * step + reach))
    if (first, last) != (0, image.height):
        image = image.crop((0, first, image.width, last))
    # The end of the last pixel of a tiny image, rounded, may lie just outside.
    across = (left * step, 0, min(image.width, (left + width) * step), image.height)
    image = image.resize((width, image.height), Image.Resampling.LANCZOS, box=across)
    down = (0, top * step - first, width, min(image.height, (top + height) * step - first))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=down)


def _scale_plane(plane: np.ndarray, window, step: float) -> np.ndarray:
    if plane.dtype == np.uint8:
        return np.asarray(_resized(Image.fromarray(np.ascontiguousarray(plane)), window, step))
    scaled = np.asarray(_resized(Image.fromarray(plane.astype(np.float32)), window, step))
    if plane.dtype == np.uint16:
        return np.clip(np.rint(scaled), 0, 65535).astype(np.uint16)
    return np.clip(scaled, -1, 1)  # Lanczos overshoots at edges


def prepare(
    decoded: Decoded, target: tuple[int, int], channels: int, dtype: str, crop: tuple[float, float]
) -> torch.Tensor:
    """Scale a decoded image to cover `target` and crop it at (y, x); return a tensor (C, height, width) of the dtype."""
    cover = cover_size(decoded.size, target)
    window = (*crop_offset(cover, target, crop), *target)
    return torch.from_numpy(scale(to_channels(decoded.pixels, channels, dtype), decoded.size, target, window))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """
    Convert the images of a batch to float32 in [-1, 1], of the same shape and on the same device.

    uint8 0..255 and uint16 0..65535 are mapped to [-1, 1] linearly; float32 images are in [-1, 1] already.

    Raises:
        TypeError: any other dtype.
    """
    if images.dtype == torch.float32:
        return images
    half = {torch.uint8: 127.5, torch.uint16: 32767.5}.get(images.dtype)
    if half is None:
        raise TypeError(f"to_float takes uint8, uint16 or float32 images; got {images.dtype}.")
    return images.to(torch.float32) / half - 1
