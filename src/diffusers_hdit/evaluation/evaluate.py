"""Compare the images that a pipeline generates with real ones.

    diffusers-hdit evaluate --pipeline DIR --train_data_dir my_images --num_images 5000 --output results.json
    accelerate launch -m diffusers_hdit.evaluation.evaluate ...                              (the same on several processes)

Each image is generated from a seed of its own; several processes generate a share each, and find what one finds, to the
bit at the same --batch_size. Classes come in turn, or with --label_column in the proportions of the real images;
conditions (--condition_columns) are those of the real images.
"""

import argparse
import sys
from collections.abc import Sequence

from ..utils.arguments import ArgumentParser
from . import FEATURE_NETWORKS, METRICS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder with a saved HDiTPipeline, or its name on the Hub")
    add("--train_data_dir", help="folder of real images, or sheet")
    add("--dataset_name", help="Hugging Face dataset of real images")
    add("--dataset_config_name")
    add("--split", default="train")
    add("--image_column", default="image")
    add("--label_column", help="generate classes in the proportions of the real images")
    add("--condition_columns", nargs="+", help="of a model trained on them: generate with the real images' conditions")
    add("--cache_dir", help="for the check of the images and the features of the real ones")
    add("--metrics", nargs="+", choices=METRICS, help="default: those that the feature network has")
    add("--num_images", type=int, default=5000, help="generated images")
    add("--feature_network", default="efficientnet-lite0", help=f"{', '.join(FEATURE_NETWORKS)}, or module:function")
    add("--feature_weights", help="file (inception-v3), folder or name on the Hub (dinov2, clip); default: downloaded")
    add("--network_resolution", type=int, help="resize images to this for the network; default: the network's own")
    add("--resize_filter", choices=("bicubic", "bilinear"), help="default: the network's own")
    add("--reference_statistics", help=".npz with mu and sigma in place of real images: fid, frechet_distance only")
    add("--save_statistics", help="also write the real images' mu and sigma, in ADM's format")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=1.0)
    add("--batch_size", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--output", help="JSON file to write the results to")
    add("--save_npz", help="also write the images as a batch for ADM's evaluator")
    add(
        "--neighbors_picture",
        help="also write a grid of the images most like real ones beside their nearest neighbors",
    )
    add("--neighbors", type=int, default=4, help="neighbors in a row of that grid")
    add("--neighbors_rows", type=int, default=8)
    args = parser.parse_args(argv)
    if args.num_images < 4 or args.batch_size < 1:
        parser.error("--num_images must be at least 4, --batch_size at least 1.")
    if args.neighbors < 2 or args.neighbors_rows < 1:
        parser.error("--neighbors must be at least 2, --neighbors_rows at least 1.")
    if args.reference_statistics and (args.save_statistics or args.neighbors_picture):
        parser.error("--save_statistics and --neighbors_picture need the real images, not --reference_statistics.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `diffusers-hdit evaluate`; what can't be done ends the program with one line."""
    args = parse_args(argv)
    from .evaluator import evaluate_pipeline  # imports torch

    try:
        evaluate_pipeline(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
