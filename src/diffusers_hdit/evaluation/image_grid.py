"""Labelled grids of images."""

import math
from collections.abc import Collection, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .metrics import near_copies


MARGIN, HEADER_HEIGHT, CAPTION_HEIGHT, CAPTION_WIDTH = 4, 20, 18, 64


def image_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    cell_size: int,
    header: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    framed_rows: Collection[int] = (),
) -> Image.Image:
    """
    Return an image with a row of images for each entry of `rows`.

    Args:
        rows: the name of each row, which is written to its left, and its images, all of one size.
        cell_size: smaller images are enlarged by a whole factor to at least this many pixels.
        header: names of the columns.
        captions: a text below each image, for each row.
        framed_rows: indices of the rows whose first image gets a red frame.
    """
    scale = max(1, math.ceil(cell_size / max(rows[0][1][0].size)))
    width, height = (scale * side for side in rows[0][1][0].size)
    font = ImageFont.load_default(size=14)
    left = max(math.ceil(font.getlength(name)) for name, _ in rows)
    left += 3 * MARGIN if left else MARGIN
    top = MARGIN + (HEADER_HEIGHT if header else 0)
    column_width = MARGIN + (max(width, CAPTION_WIDTH) if captions else width)
    row_height = MARGIN + height + (CAPTION_HEIGHT if captions else 0)
    columns = max(len(images) for _, images in rows)
    grid = Image.new("RGB", (left + columns * column_width, top + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(grid)
    for column, name in enumerate(header):
        draw.text((left + column * column_width, MARGIN), name, fill="black", font=font)
    for row, (name, images) in enumerate(rows):
        y = top + row * row_height
        draw.text((MARGIN, y + height // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            x = left + column * column_width
            grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (x, y))
            if captions:
                draw.text((x, y + height + 1), captions[row][column], fill="black", font=font)
        if row in framed_rows:
            draw.rectangle((left - 2, y - 2, left + width + 1, y + height + 1), outline="red", width=2)
    return grid


def most_like_copies(distances: Tensor, rows: int) -> list[int]:
    """Return the indices of the generated images whose nearest real image is nearest, relative to the second one."""
    ratio = distances[:, 0] / distances[:, 1].clamp(min=torch.finfo(distances.dtype).tiny)
    return ratio.argsort(stable=True)[:rows].tolist()


def neighbors_grid(names: Sequence[str], generated: Tensor, nearest: Tensor, distances: Tensor) -> Image.Image:
    """
    Return a grid with a row for each generated image: itself, in a red frame if it is a near copy, and its nearest real
    images with their distances.

    Args:
        names: of the rows.
        generated: uint8 `(R, C, H, W)`.
        nearest: uint8 `(R, k, C, H, W)`, the nearest first.
        distances: `(R, k)`, k at least 2.
    """
    copies = near_copies(distances).tolist()
    rows = [
        (name, [to_pil(pixels) for pixels in (image, *others)])
        for name, image, others in zip(names, generated, nearest, strict=True)
    ]
    captions = [
        ["near copy" if copy else "", *(f"{distance:.4g}" for distance in row)]
        for copy, row in zip(copies, distances.tolist(), strict=True)
    ]
    header = ["generated", "nearest", *(f"number {i}" for i in range(2, nearest.shape[1] + 1))]
    return image_grid(rows, 96, header, captions, [row for row, copy in enumerate(copies) if copy])


def to_pil(pixels: Tensor) -> Image.Image:
    """Return uint8 pixels `(1|3|4, H, W)` as an RGB image, transparency on white."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
