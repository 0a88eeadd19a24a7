"""Draws images from a pipeline and compares them with real ones.

    python examples/evaluate_hdit.py --pipeline DIR --train_data_dir my_images --num_images 5000 --output results.json

Image number i is drawn from a seed of its own, so that it does not depend on the batch size. Classes come in turn, or
with --label_column in the proportions of the real images.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_hdit import HDiTPipeline, metrics
from diffusers_hdit.data import load_images
from diffusers_hdit.many_images import image_seed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder with a saved HDiTPipeline, or its name on the Hub")
    add("--train_data_dir", help="folder of real images, or sheet")
    add("--dataset_name", help="Hugging Face dataset of real images")
    add("--dataset_config_name")
    add("--split", default="train")
    add("--image_column", default="image")
    add("--label_column", help="draw classes in the proportions of the real images")
    add("--cache_dir", help="for the check of the images and the features of the real ones")
    add("--metrics", nargs="+", default=list(metrics.METRICS), choices=metrics.METRICS)
    add("--num_images", type=int, default=5000)
    add("--feature_network", default="efficientnet-lite0", help="or module:function that returns a network")
    add("--network_resolution", type=int, help="resize images to this for the network; default: the network's own")
    add("--resize_filter", default="bicubic", choices=("bicubic", "bilinear"))
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=1.0)
    add("--batch_size", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--output", help="JSON file to write the results to")
    add("--save_npz", help="also write the images as a batch for ADM's evaluator")
    args = parser.parse_args(argv)
    if args.num_images < 4 or args.batch_size < 1:
        parser.error("--num_images must be at least 4, --batch_size at least 1.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for path in (args.output, args.save_npz):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"the folder of {path!r} does not exist.")
    extractor = metrics.load_extractor(args.feature_network, args.network_resolution, args.resize_filter)
    pipeline = HDiTPipeline.from_pretrained(args.pipeline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    real = load_images(
        train_data_dir=args.train_data_dir,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        split=args.split,
        image_column=args.image_column,
        label_column=args.label_column,
        cache_dir=args.cache_dir,
        resolution=pipeline.transformer.sample_size,
        in_channels=pipeline.transformer.config.in_channels,
        center_crop=True,
    )
    labels = class_labels(pipeline, real, args)
    cache = args.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "diffusers_hdit").expanduser()
    real_features = metrics.cached_features(
        extractor, lambda: real_batches(real, args.batch_size), Path(cache) / "features", device
    )
    drawn, features = [], []
    for batch in tqdm(draw(pipeline, labels, args), total=-(-args.num_images // args.batch_size), desc="drawing"):
        features.append(extractor.features([batch], device))
        if args.save_npz:
            drawn.append(batch)
    results = metrics.evaluate(torch.cat(features), real_features, args.metrics, extractor)
    about = {"steps": args.num_inference_steps, "guidance_scale": args.guidance_scale, "seed": args.seed}
    results = [{**result, **about} for result in results]
    if args.save_npz:
        metrics.save_adm_samples(args.save_npz, torch.cat(drawn))
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report(results)


def real_batches(real, batch_size: int) -> Iterator[torch.Tensor]:
    for start in range(0, len(real), batch_size):
        yield torch.stack([real[i]["image"] for i in range(start, min(start + batch_size, len(real)))])


def class_labels(pipeline: HDiTPipeline, real, args) -> list[int] | None:
    """A class for each image to draw; None for a model without classes."""
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        if args.label_column:
            raise ValueError("--label_column was given, but this model was trained without classes.")
        return None
    if not args.label_column:
        return [i % num_classes for i in range(args.num_images)]
    if dict(real.id2label) != dict(pipeline.id2label):
        raise ValueError(
            f"the classes of the real images, {list(real.id2label.values())}, are not those of the model, "
            f"{list(pipeline.id2label.values())}."
        )
    # Evenly through the set, which may be sorted by class.
    return [real[i * len(real) // args.num_images]["label"] for i in range(args.num_images)]


def draw(pipeline: HDiTPipeline, labels: list[int] | None, args) -> Iterator[torch.Tensor]:
    """Batches of uint8 images `(B, C, H, W)`."""
    for start in range(0, args.num_images, args.batch_size):
        numbers = range(start, min(start + args.batch_size, args.num_images))
        images = pipeline(
            None if labels is None else [labels[i] for i in numbers],
            num_images_per_prompt=len(numbers) if labels is None else 1,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(image_seed(args.seed, i)) for i in numbers],
            output_type="pt",
        ).images
        yield (images.float() * 255).round().to(torch.uint8).cpu()


def report(results: list[dict]) -> None:
    first = results[0]
    print(
        f"{first['images']} images against {first['real_images']} real ones, features of {first['feature_network']} at "
        f"{first['network_resolution']} ({first['resize_filter']}):"
    )
    for result in results:
        line = f"  {result['name']}: {result['value']:.6g}"
        if result.get("standard_error") is not None:
            line += f" ± {result['standard_error']:.2g}"
        if "floor" in result:
            line += (
                f" (too large with few images: two sets of {result['floor_images']} real images are "
                f"{result['floor']:.6g} apart)"
            )
        print(line)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
