"""Draws images from a pipeline and compares them with real ones.

    accelerate launch examples/evaluate_hdit.py --pipeline DIR --train_data_dir my_images --num_images 5000 --output FILE

Image number i is drawn from a seed of its own. Several processes draw a share each and find what one finds, to the bit at
the same --batch_size. Classes come in turn, or with --label_column in the proportions of the real images; conditions
(--condition_columns) are the real images'.
"""

import argparse
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from diffusers_hdit import HDiTPipeline
from diffusers_hdit.data import load_images
from diffusers_hdit.evaluation import evaluator as evaluation
from diffusers_hdit.evaluation import metrics
from diffusers_hdit.evaluation.feature_extractors import NETWORKS


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
    add("--condition_columns", nargs="+", help="of a model trained on them: draw with the real images' conditions")
    add("--cache_dir", help="for the check of the images and the features of the real ones")
    add("--metrics", nargs="+", choices=metrics.METRICS, help="default: those that the feature network has")
    add("--num_images", type=int, default=5000)
    add("--feature_network", default="efficientnet-lite0", help=f"{', '.join(NETWORKS)}, or module:function")
    add("--feature_weights", help="file (inception-v3), folder or name on the Hub (dinov2, clip); default: fetched")
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
    add("--neighbors_picture", help="also draw the images most like real ones beside their nearest neighbours")
    add("--neighbors", type=int, default=4, help="neighbours in a row of that picture")
    add("--neighbors_rows", type=int, default=8)
    args = parser.parse_args(argv)
    if args.num_images < 4 or args.batch_size < 1:
        parser.error("--num_images must be at least 4, --batch_size at least 1.")
    if args.neighbors < 2 or args.neighbors_rows < 1:
        parser.error("--neighbors must be at least 2, --neighbors_rows at least 1.")
    if args.reference_statistics and (args.save_statistics or args.neighbors_picture):
        parser.error("--save_statistics and --neighbors_picture need the real images, not --reference_statistics.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Processes wait for the slowest one, for longer than the 10 minutes after which NCCL gives up.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    for path in (args.output, args.save_npz, args.save_statistics, args.neighbors_picture):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"the folder of {path!r} does not exist.")
    with state.main_process_first():  # weights may have to be fetched, images checked
        extractor = metrics.load_extractor(
            args.feature_network, args.network_resolution, args.resize_filter, args.feature_weights
        )
        pipeline = HDiTPipeline.from_pretrained(args.pipeline)
        real = open_real(args, pipeline) if needs_real(args) else None
    wanted, statistics = what_to_compute(args, extractor, pipeline)
    check_files(args, pipeline, real)
    pipeline.to(state.device)
    config = pipeline.transformer.config
    conditions = evaluation.conditions_for(
        config, real, args.num_images, pipeline.id2label, pipeline.config.condition_columns
    )
    drawing = evaluation.Drawing(
        pipeline,
        conditions,
        args.num_images,
        args.batch_size,
        args.num_inference_steps,
        args.guidance_scale,
        args.seed,
    )
    real_features = None
    if statistics is None:
        cache = evaluation.default_cache_dir(args.cache_dir) / "features"
        real_features = evaluation.reference_features(extractor, real, args.batch_size, cache)
    batches = -(-args.num_images // args.batch_size)
    progress = lambda drawn: tqdm(drawn, total=batches, desc="drawing", disable=not state.is_main_process)  # noqa: E731
    features, images = evaluation.features_of(drawing, extractor, bool(args.save_npz), progress)
    if not state.is_main_process:
        return
    results = metrics.evaluate(features, real_features, wanted, extractor, statistics)
    about = {"pipeline": Path(args.pipeline).name, **drawing.facts, "reference_statistics": args.reference_statistics}
    results = [{**result, **about} for result in results]
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report(results)
    if args.save_npz:
        metrics.save_adm_samples(args.save_npz, images)
    if args.save_statistics:
        metrics.save_adm_statistics(args.save_statistics, *metrics.mean_and_covariance(real_features))
    if args.neighbors_picture:
        save_neighbors_picture(args, drawing, real, features, real_features)


def needs_real(args: argparse.Namespace) -> bool:
    """Beside statistics, only for what images are drawn from."""
    return not args.reference_statistics or bool(args.label_column or args.condition_columns)


def check_files(args: argparse.Namespace, pipeline: HDiTPipeline, real) -> None:
    """Whether what is to be written can be, before anything is drawn."""
    channels = pipeline.transformer.config.in_channels
    if args.save_npz and channels != 3:
        raise ValueError(
            f"--save_npz: ADM's evaluator takes RGB images, and this model draws {channels} channels: leave it out."
        )
    if args.neighbors_picture and args.neighbors > len(real):
        raise ValueError(
            f"--neighbors {args.neighbors} is more than the {len(real)} real images: give {len(real)} or less."
        )


def open_real(args: argparse.Namespace, pipeline: HDiTPipeline):
    """The real images as the model would draw them; with its own normalisation of their conditions."""
    columns = args.condition_columns
    real = load_images(
        train_data_dir=args.train_data_dir,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        split=args.split,
        image_column=args.image_column,
        label_column=args.label_column,
        condition_columns=columns,
        condition_statistics=pipeline.config.condition_columns if columns else None,
        cache_dir=args.cache_dir,
        resolution=pipeline.transformer.sample_size,
        in_channels=pipeline.transformer.config.in_channels,
        center_crop=True,
    )
    evaluation.check_real(real)
    return real


def what_to_compute(args: argparse.Namespace, extractor: metrics.FeatureExtractor, pipeline: HDiTPipeline):
    """Names of metrics, and the statistics to compare with or None."""
    if not args.reference_statistics:
        wanted = args.metrics or metrics.default_metrics(extractor)
        metrics.check_metrics(wanted, extractor, images=args.num_images)
        return wanted, None
    default = [name for name in metrics.default_metrics(extractor) if name in metrics.OF_STATISTICS]
    wanted = args.metrics or default or ["frechet_distance"]
    metrics.check_metrics(wanted, extractor, of_statistics=True)
    mean, covariance = metrics.load_adm_statistics(args.reference_statistics)
    width = extractor.width(pipeline.transformer.config.in_channels, pipeline.transformer.sample_size)
    if (mean.shape, covariance.shape) != ((width,), (width, width)):
        raise ValueError(
            f"{args.reference_statistics!r} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, but "
            f"{extractor.name} has {width} features: give the statistics of this network's features, or the network "
            "that they are of as --feature_network."
        )
    return wanted, (mean, covariance)


def save_neighbors_picture(args, drawing: evaluation.Drawing, real, features, real_features) -> None:
    index, distances = metrics.nearest_neighbors(features, real_features, args.neighbors)
    rows = evaluation.most_like_copies(distances, args.neighbors_rows)
    evaluation.neighbors_picture(
        [f"image {i}" for i in rows],
        drawing.images(rows),  # drawn once more: nobody kept them
        torch.stack([evaluation.real_images(real, index[i].tolist()) for i in rows]),
        distances[rows],
    ).save(args.neighbors_picture)


def report(results: list[dict]) -> None:
    first = results[0]
    real = "given statistics" if first["real_images"] is None else f"{first['real_images']} real ones"
    print(
        f"{first['images']} images against {real}, features of {first['feature_network']} at "
        f"{first['network_resolution']} ({first['resize_filter']}):"
    )
    for result in results:
        line = f"  {result['name']}: {result['value']:.6g}"
        for deviation in ("standard_error", "standard_deviation"):
            if result.get(deviation) is not None:
                line += f" ± {result[deviation]:.2g}"
        if "floor" in result:
            line += (
                f" (too large with few images: two sets of {result['floor_images']} {result['floor_of']} each are "
                f"{result['floor']:.6g} apart; this is of {first['images']} drawn ones against {real}, so that is no lower "
                "bound)"
            )
        elif "bias" in result:
            line += f" ({result['bias']})"
        print(line)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
