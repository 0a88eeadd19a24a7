"""Generate images with a saved pipeline: a labelled grid, or many of them, a file each.

    diffusers-hdit sample --pipeline DIR --output grid.png [--images_per_class 8] [--guidance_scale 1.5]

The rows of the grid are the classes (four rows without classes); --real_images puts a row of real images above them.

    accelerate launch -m diffusers_hdit.evaluation.sample --pipeline DIR --output FOLDER --num_images 50000 --batch_size auto

writes 000000.png, 000001.png, ... on all processes, the classes in turn; --output FILE.npz packs them for the evaluation
suite of ADM (arr_0: images, arr_1: labels). An image does not depend on the batch size and the number of processes. To
generate the images that are missing after an interruption, run the same command again.
"""

import argparse
import sys
from collections.abc import Sequence

from ..utils.arguments import ArgumentParser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder with a saved HDiTPipeline, or its name on the Hub")
    add("--output", required=True, help="image file; with --num_images a folder, or a file that ends in .npz")
    add("--num_images", type=int, help="generate so many, each into a file of its own, instead of a grid")
    add("--class_labels", nargs="+", help="classes by name or number; default: all")
    add("--images_per_class", type=int, help="columns of the grid (default: 8)")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--batch_size", type=batch_size, default=64, help="images per batch; auto: as many as fit into memory")
    add("--cell_size", type=int, help="enlarge smaller images to this size in the grid (default: 64)")
    add("--real_images", help="folder of images, or sheet, to show in the grid's first row for comparison")
    args = parser.parse_args(argv)
    if args.num_images is None and args.batch_size == "auto":
        parser.error("--batch_size auto is for --num_images; a grid needs a number.")
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `diffusers-hdit sample`; what can't be done ends the program with one line."""
    args = parse_args(argv)
    from .generate import sample_files, sample_grid  # imports torch

    try:
        sample_grid(args) if args.num_images is None else sample_files(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
