"""Draws images from a pipeline: a labelled grid, or many of them, one file each.

    python examples/sample_hdit.py --pipeline DIR --output grid.png [--images_per_class 8] [--guidance_scale 1.5]

Rows are the classes (an unconditional model has one block of rows); --real_images puts real images above them.

    accelerate launch examples/sample_hdit.py --pipeline DIR --output FOLDER --num_images 50000 --batch_size auto

writes 000000.png, 000001.png, ... on all processes, the classes in turn; --output FILE.npz packs them for the evaluation
of ADM (arr_0: images, arr_1: labels). Image i is the same whatever the batch size and the number of processes. The same
command again draws what is missing.
"""

import argparse
import math
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image, ImageDraw, ImageFont

from diffusers_hdit import HDiTPipeline
from diffusers_hdit.data import load_images
from diffusers_hdit.evaluation.generate import draw_many, image_seed


MARGIN = 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder with a saved HDiTPipeline")
    add("--output", required=True, help="picture to write; with --num_images a folder, or a file that ends in .npz")
    add("--num_images", type=int, help="draw so many, each into a file of its own, instead of a grid")
    add("--class_labels", nargs="+", help="classes by name or number; default: all")
    add("--images_per_class", type=int, help="columns of the grid, 8 if not given")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--batch_size", type=batch_size, default=64, help="images drawn at once; auto: as many as the memory holds")
    add("--cell_size", type=int, help="enlarge smaller images to this size in the grid, 64 if not given")
    add("--real_images", help="folder of images, or sheet, to show in the grid's first row for comparison")
    args = parser.parse_args(argv)
    if args.num_images is None and args.batch_size == "auto":
        parser.error("--batch_size auto is for --num_images; a grid is drawn with a number.")
    if args.num_images is not None:
        for name in ("images_per_class", "cell_size", "real_images"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} is for a grid, not for --num_images.")
    args.images_per_class = args.images_per_class or 8
    args.cell_size = args.cell_size or 64
    return args


def batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.num_images is not None:
        draw_files(args)
        return
    if Path(args.output).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {args.output!r} must end in a picture's extension, such as .png.")
    pipeline = HDiTPipeline.from_pretrained(args.pipeline)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = class_rows(pipeline, args.class_labels)
    real = real_row(pipeline, args.real_images, args.images_per_class) if args.real_images else None

    # A generator for each image: image i is the same whatever the batch size.
    labels = [label for _, label in rows for _ in range(args.images_per_class)]
    images = []
    for start in range(0, len(labels), args.batch_size):
        part = labels[start : start + args.batch_size]
        generators = [torch.Generator().manual_seed(image_seed(args.seed, start + i)) for i in range(len(part))]
        unlabelled = part[0] is None
        images += pipeline(
            None if unlabelled else part,
            num_images_per_prompt=len(part) if unlabelled else 1,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=generators,
        ).images

    lines = [("real", real)] if real else []
    for i, (name, _) in enumerate(rows):
        lines.append((name, images[i * args.images_per_class : (i + 1) * args.images_per_class]))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    draw_grid(lines, args.cell_size).save(args.output)
    print(f"Wrote {args.output}: {len(images)} images in {len(rows)} rows.")


def draw_files(args: argparse.Namespace) -> None:
    # Processes wait for the slowest one, for longer than the 10 minutes after which NCCL gives up.
    state = PartialState(timeout=timedelta(days=7))
    pipeline = HDiTPipeline.from_pretrained(args.pipeline)
    pipeline.to(state.device)
    labels = None
    if pipeline.transformer.config.num_classes is not None or args.class_labels:
        labels = [label for _, label in class_rows(pipeline, args.class_labels)]
    draw_many(
        pipeline,
        args.output,
        args.num_images,
        class_labels=labels,
        batch_size=args.batch_size,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )
    state.print(f"Wrote {args.num_images:,} images to {args.output}.")


def class_rows(pipeline: HDiTPipeline, class_labels: list[str] | None) -> list[tuple[str, int | None]]:
    """(name, class number) of each row; the number is None for a model without classes."""
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        if class_labels:
            raise ValueError("--class_labels were given, but this model was trained without classes.")
        return [("", None)] * 4
    names = pipeline.id2label
    if class_labels is None:
        ids = list(range(num_classes))
    else:
        ids = pipeline.encode_labels([int(c) if c.isdecimal() else c for c in class_labels]).tolist()
    return [(names.get(i, str(i)), i) for i in ids]


def real_row(pipeline: HDiTPipeline, source: str, count: int) -> list[Image.Image]:
    """Real images, evenly taken from the source, as the network saw them."""
    config = pipeline.transformer.config
    dataset = load_images(
        train_data_dir=source, resolution=config.sample_size, in_channels=config.in_channels, center_crop=True
    )
    picked = [dataset[i * len(dataset) // count]["image"] for i in range(min(count, len(dataset)))]
    return pipeline.image_processor.postprocess(torch.stack(picked) / 127.5 - 1, "pil")


def draw_grid(
    lines: list[tuple[str, list[Image.Image]]], cell_size: int, header: list[str] | None = None
) -> Image.Image:
    """One line of images a row, its name to the left; `header` names the columns, from the first one on."""
    scale = max(1, math.ceil(cell_size / max(lines[0][1][0].size)))
    width, height = (scale * side for side in lines[0][1][0].size)
    font = ImageFont.load_default(size=14)
    label_width = max(math.ceil(font.getlength(name)) for name, _ in lines)
    label_width += 2 * MARGIN if label_width else 0
    header_height = 20 if header else 0
    columns = max(len(images) for _, images in lines)
    size = (label_width + columns * (width + MARGIN) + MARGIN, header_height + len(lines) * (height + MARGIN) + MARGIN)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, name in enumerate(header or []):
        draw.text((label_width + MARGIN + column * (width + MARGIN), MARGIN), name, fill="black", font=font)
    for row, (name, images) in enumerate(lines):
        top = header_height + MARGIN + row * (height + MARGIN)
        draw.text((MARGIN, top + height // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            grid.paste(enlarged, (label_width + MARGIN + column * (width + MARGIN), top))
    return grid


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
