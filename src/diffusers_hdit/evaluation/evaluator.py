"""Comparing the images that a model generates with real ones, afterwards or during training, on any number of processes.

Image i is generated from a seed of its own, and always in the same batch, whichever process generates it: several
processes find the bits that one finds. `diffusers-hdit evaluate` and `--metrics_every` of the training share all of it.
"""

import contextlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ..data import load_images
from ..pipelines.pipeline_hdit import HDiTPipeline
from ..utils.distributed import broadcast_from_main, distributed_map
from ..utils.files import write_atomically
from . import metrics
from .feature_extractors import FeatureExtractor, cache_path, load_extractor, read_cache, write_cache
from .generate import generate_batch
from .image_grid import most_like_copies, neighbors_grid


# ----------------------------------------------------------------------------------------------------------------------
# Real images


def check_real_images(real) -> None:
    """
    Check that a dataset can be compared with.

    Raises:
        ValueError: for a stream, several sizes, fewer than 4 images, or images that are not of 8 bits and 1, 3 or 4
            channels.
    """
    if not real.has_length:
        raise ValueError("real images are read more than once, which a stream does not allow: give a set on disk.")
    if len(real.sizes) > 1:
        raise ValueError(
            "the real images have several sizes (buckets); generated ones are compared at one size: open them without "
            "buckets."
        )
    if real.dtype != "uint8" or real.in_channels not in (1, 3, 4):
        raise ValueError(
            f"feature networks take 8-bit images of 1, 3 or 4 channels; these are {real.dtype} of {real.in_channels}: "
            "convert them to grey, RGB or RGBA files of 8 bits."
        )
    if len(real) < 4:
        raise ValueError(f"at least 4 real images are needed, got {len(real)}: give more of them.")


def real_images(real, indices: Iterable[int]) -> Tensor:
    """Return images of a dataset as uint8 `(B, C, H, W)`, cropped in the middle."""
    return torch.stack([real[i, (0.5, 0.5)]["image"] for i in indices])


def reference_features(
    extractor: FeatureExtractor, real, batch_size: int, cache_dir: str | Path | None = None
) -> Tensor | None:
    """
    Compute the features of the real images on all processes, or take them from the cache.

    Args:
        cache_dir: where they are kept, in the folder `features`; default: this package's cache folder.

    Returns:
        Features `(N, D)` on the main process, None elsewhere.
    """
    state = PartialState()
    path = cache_path(extractor, real, cache_dir)
    cached = read_cache(path) if state.is_main_process else None
    if broadcast_from_main(lambda: cached is not None):
        return cached
    extractor.network.to(state.device)
    compute = lambda indices: (extractor(real_images(real, indices).to(state.device)),)  # noqa: E731
    features = torch.cat([batch.cpu() for (batch,) in distributed_map(compute, len(real), batch_size)])
    if not state.is_main_process:
        return None
    write_cache(path, features)
    return features


# ----------------------------------------------------------------------------------------------------------------------
# Generated images


def conditions_for(
    config, real, num_images: int, id2label: Mapping[int, str], condition_columns: dict | None
) -> dict[str, Tensor]:
    """
    Return what images are generated from: labels and conditions of real images taken evenly through the set, which may be
    sorted, so in the same proportions and combinations; without labels of the real images, the classes in turn.

    Args:
        config: of the network.
        real: the real images; None if nothing is taken from them, as from real images without labels and conditions.
        id2label, condition_columns: of the model, as `HDiTPipeline` has them.

    Raises:
        ValueError: for a model that upscales, for real images with other classes or conditions than the model's, and for
            a model trained on conditions when they have none.
    """
    if config.conditioning_channels:
        raise ValueError(
            "this model upscales images; what is evaluated here are models that generate from noise: give one that does."
        )
    labels = None if real is None else real.labels
    values = None if real is None else real.conditions
    indices = [] if real is None else [i * len(real) // num_images for i in range(num_images)]
    conditions = {}
    if config.num_classes is None and labels is not None:
        raise ValueError("--label_column was given, but this model was trained without classes: leave it out.")
    if labels is not None:
        if dict(real.id2label) != dict(id2label):
            raise ValueError(
                f"the classes of the real images, {list(real.id2label.values())}, are not those of the model, "
                f"{list(id2label.values())}: give the images that it was trained on and the same --label_column, or "
                "leave --label_column out to generate the model's classes in turn."
            )
        conditions["class_labels"] = torch.tensor([int(labels[i]) for i in indices])
    elif config.num_classes is not None:
        if config.mapping_cond_dim:
            raise ValueError("this model has classes and conditions, which belong together: give --label_column too.")
        conditions["class_labels"] = torch.arange(num_images) % config.num_classes
    if not config.mapping_cond_dim:
        if values is not None:
            raise ValueError(
                "--condition_columns were given, but this model was trained without conditions: leave them out."
            )
        return conditions
    trained = (condition_columns or {}).get("names")
    if values is None or real.condition_columns["names"] != trained:
        given = "none were given" if values is None else f"the real images have {real.condition_columns['names']}"
        remedy = (
            "Give these columns in --condition_columns."
            if trained
            else "Save the pipeline with condition_columns (names, mean, std), and give them in --condition_columns."
        )
        raise ValueError(
            f"this model was trained on the conditions {trained or 'of a caller, without names'}, and {given}: images "
            f"generated from others could not be compared with the real ones. {remedy}"
        )
    values = torch.stack([torch.as_tensor(values[i]) for i in indices])
    # Where the training dropped conditions, a last entry of 1 says that there is one.
    conditions["mapping_cond"] = F.pad(values, (0, config.mapping_cond_dim - values.shape[1]), value=1.0)
    return conditions


@dataclass
class ImageGenerator:
    """
    The generated images of an evaluation, by index.

    Attributes:
        pipeline: on this process's device.
        conditions: arguments of the pipeline, one entry an image.
        size: (height, width); None is the trained size.
        autocast: makes the context that the pipeline runs in.
        callback_on_step_end: of the pipeline.
    """

    pipeline: HDiTPipeline
    conditions: dict[str, Tensor]
    num_images: int
    batch_size: int
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    seed: int = 0
    size: tuple[int, int] | None = None
    autocast: Callable = contextlib.nullcontext
    callback_on_step_end: Callable | None = None

    def generate(self, indices: Iterable[int]) -> Tensor:
        """Generate the images with these indices, uint8 `(B, C, H, W)` on the pipeline's device."""
        height, width = self.size or (None, None)
        with self.autocast():
            images = generate_batch(
                self.pipeline, indices, self.seed, self.conditions, height=height, width=width, output_type="pt",
                num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale,
                callback_on_step_end=self.callback_on_step_end,
            )  # fmt: skip
        return (images.float() * 255).round().to(torch.uint8)

    @property
    def settings(self) -> dict[str, object]:
        """What a result must name besides the network and the counts."""
        scheduler = self.pipeline.scheduler
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        height, width = self.size or self.pipeline.transformer.sample_size
        return {
            "image_resolution": [height, width],
            "sampler": {"class": type(scheduler).__name__, **config},
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "conditions": sorted(self.conditions),
        }


def generated_features(
    generator: ImageGenerator,
    extractor: FeatureExtractor,
    keep_images: bool = False,
    progress: Callable = lambda batches: batches,
) -> tuple[Tensor, Tensor | None]:
    """
    Generate images on all processes and compute their features. Each device holds no more than a batch at a time.

    Returns:
        Features `(N, D)` on the CPU of every process; and with `keep_images` the images on the main one, else None.
    """
    state = PartialState()
    extractor.network.to(state.device)

    def compute(indices):
        images = generator.generate(indices).to(state.device)  # the pipeline may be elsewhere
        return (extractor(images), images) if keep_images else (extractor(images),)

    features, kept = [], []
    for batch in progress(distributed_map(compute, generator.num_images, generator.batch_size)):
        features.append(batch[0].cpu())
        if keep_images and state.is_main_process:
            kept.append(batch[1].cpu())
    return torch.cat(features), torch.cat(kept) if kept else None


# ----------------------------------------------------------------------------------------------------------------------
# During training


@dataclass
class InTrainingEvaluator:
    """
    Compares generated images with the training set every `args.metrics_every` steps: the same images, seeds and real
    features each time.

    Attributes:
        args: metrics_every, metrics, metrics_images, metrics_steps, train_batch_size, seed, cache_dir.
        real: the training set.
        last_step: the newest step that was measured; a resumed run does not measure it again.

    Raises:
        ValueError: for metrics or a set that do not fit.
    """

    args: object
    extractor: FeatureExtractor
    real: object
    last_step: int | None = None
    real_features: Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        self.names = self.args.metrics or metrics.default_metrics(self.extractor)
        metrics.check_metrics(self.names, self.extractor, images=self.args.metrics_images)
        check_real_images(self.real)

    @classmethod
    def from_args(cls, args, real) -> "InTrainingEvaluator | None":
        """
        Return the evaluator that the flags ask for, None without `--metrics_every`. The random state is left unchanged.

        Args:
            args: as of the class, and feature_network, feature_weights.

        Raises:
            ImportError, OSError: if packages or weights of the feature network are missing.
            ValueError: for a network, metrics or a set that do not fit.
        """
        if not args.metrics_every:
            return None
        with PartialState().main_process_first():  # weights may have to be downloaded
            extractor = load_extractor(args.feature_network, weights=args.feature_weights)
        return cls(args, extractor, real)

    def is_due(self, step: int, total_steps: int) -> bool:
        return step != self.last_step and (step % self.args.metrics_every == 0 or step == total_steps)

    def measure(
        self, pipeline: HDiTPipeline, step: int, autocast: Callable, callback_on_step_end: Callable | None = None
    ) -> list[dict] | None:
        """Return results, as `metrics.evaluate` does, on the main process, None elsewhere. All processes must call it."""
        args, real = self.args, self.real
        conditions = conditions_for(
            pipeline.transformer.config, real, args.metrics_images, real.id2label or {}, real.condition_columns
        )
        images, steps = args.metrics_images, args.metrics_steps
        generator = ImageGenerator(
            pipeline,
            conditions,
            images,
            args.train_batch_size,
            steps,
            seed=args.seed,
            autocast=autocast,
            callback_on_step_end=callback_on_step_end,
        )
        if not broadcast_from_main(lambda: self.real_features is not None):
            self.real_features = reference_features(self.extractor, real, args.train_batch_size, args.cache_dir)
        features, _ = generated_features(generator, self.extractor)
        self.extractor.network.to("cpu")  # its memory is the training's
        self.last_step = step
        if not PartialState().is_main_process:
            return None
        results = metrics.evaluate(features, self.real_features, self.names, self.extractor)
        return [{**result, **generator.settings} for result in results]


# ----------------------------------------------------------------------------------------------------------------------
# What `diffusers-hdit evaluate` does


def evaluate_pipeline(args: Namespace) -> None:
    """Generate images on all processes, compare them with real ones, print the results and write what the flags name."""
    # Processes wait for the slowest one, for longer than the 10 minutes after which NCCL gives up.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    for path in (args.output, args.save_npz, args.save_statistics, args.neighbors_picture):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"the folder of {path!r} does not exist.")
    with state.main_process_first():  # weights may have to be downloaded, images checked
        extractor = load_extractor(
            args.feature_network, args.network_resolution, args.resize_filter, args.feature_weights
        )
        pipeline = HDiTPipeline.from_pretrained(args.pipeline)
        # Beside statistics, real images are only needed for what images are generated from.
        needed = not args.reference_statistics or args.label_column or args.condition_columns
        real = open_real_images(args, pipeline) if needed else None
    names, statistics = what_to_compute(args, extractor, pipeline)
    check_output(args, pipeline, real)
    pipeline.to(state.device)
    conditions = conditions_for(
        pipeline.transformer.config, real, args.num_images, pipeline.id2label, pipeline.config.condition_columns
    )
    generator = ImageGenerator(
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
        real_features = reference_features(extractor, real, args.batch_size, args.cache_dir)
    total = -(-args.num_images // args.batch_size)
    progress = lambda batches: tqdm(batches, total=total, desc="Batches", disable=not state.is_main_process)  # noqa: E731
    features, images = generated_features(generator, extractor, bool(args.save_npz), progress)
    if not state.is_main_process:
        return
    results = metrics.evaluate(features, real_features, names, extractor, statistics)
    about = {"pipeline": Path(args.pipeline).name, **generator.settings}
    results = [{**result, **about, "reference_statistics": args.reference_statistics} for result in results]
    if args.output:
        write_atomically(args.output, json.dumps(results, indent=2) + "\n")
    print(report(results))
    if args.save_npz:
        metrics.save_adm_samples(args.save_npz, images)
    if args.save_statistics:
        metrics.save_adm_statistics(args.save_statistics, *metrics.mean_and_covariance(real_features))
    if args.neighbors_picture:
        indices, distances = metrics.nearest_neighbors(features, real_features, args.neighbors)
        rows = most_like_copies(distances, args.neighbors_rows)
        nearest = torch.stack([real_images(real, indices[i].tolist()) for i in rows])
        generated = generator.generate(rows)  # again, since not all of them were kept
        neighbors_grid([f"image {i}" for i in rows], generated, nearest, distances[rows]).save(args.neighbors_picture)


# Flags that are arguments of `load_images`.
LOADING = ("train_data_dir", "dataset_name", "dataset_config_name", "split", "image_column", "label_column",
           "class_folder_depth", "condition_columns", "cache_dir", "max_unreadable")  # fmt: skip


def open_real_images(args: Namespace, pipeline: HDiTPipeline):
    """Open the real images at the model's size and channels, their conditions normalised as the model's are."""
    real = load_images(
        **{name: getattr(args, name) for name in LOADING},
        condition_statistics=pipeline.config.condition_columns if args.condition_columns else None,
        resolution=pipeline.transformer.sample_size,
        in_channels=pipeline.transformer.config.in_channels,
        center_crop=True,
    )
    check_real_images(real)
    return real


def what_to_compute(
    args: Namespace, extractor: FeatureExtractor, pipeline: HDiTPipeline
) -> tuple[list[str], tuple[Tensor, Tensor] | None]:
    """Return the names of the metrics, and the statistics to compare with if they are given instead of real images."""
    if not args.reference_statistics:
        names = args.metrics or metrics.default_metrics(extractor)
        metrics.check_metrics(names, extractor, images=args.num_images)
        return names, None
    default = [name for name in metrics.default_metrics(extractor) if name in metrics.OF_STATISTICS]
    names = args.metrics or default or ["frechet_distance"]
    metrics.check_metrics(names, extractor, of_statistics=True)
    mean, covariance = metrics.load_adm_statistics(args.reference_statistics)
    width = extractor.width(pipeline.transformer.config.in_channels, pipeline.transformer.sample_size)
    if len(mean) != width:
        raise ValueError(
            f"{args.reference_statistics!r} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, but "
            f"{extractor.name} has {width} features: give the statistics of this network's features, or the network "
            "that they are of as --feature_network."
        )
    return names, (mean, covariance)


def check_output(args: Namespace, pipeline: HDiTPipeline, real) -> None:
    """Check that what is to be written can be, before anything is generated."""
    channels = pipeline.transformer.config.in_channels
    if args.save_npz and channels != 3:
        raise ValueError(
            f"--save_npz: ADM's evaluator takes RGB images, and this model generates {channels} channels: leave it out."
        )
    if args.neighbors_picture and args.neighbors > len(real):
        raise ValueError(
            f"--neighbors {args.neighbors} is more than the {len(real)} real images: give {len(real)} or less."
        )


def report(results: list[dict]) -> str:
    """Return the results as text, a line for each metric."""
    first = results[0]
    real = "given statistics" if first["real_images"] is None else f"{first['real_images']} real ones"
    lines = [
        f"{first['images']} images against {real}, features of {first['feature_network']} at "
        f"{first['network_resolution']} ({first['resize_filter']}):"
    ]
    for result in results:
        line = f"  {result['name']}: {result['value']:.6g}"
        for deviation in ("standard_error", "standard_deviation"):
            if result.get(deviation) is not None:
                line += f" ± {result[deviation]:.2g}"
        if "floor" in result:
            line += (
                f" (too large with few images: two sets of {result['floor_images']} {result['floor_of']} each are "
                f"{result['floor']:.6g} apart; this is of {first['images']} generated ones against {real}, so that is no "
                "lower bound)"
            )
        elif "bias" in result:
            line += f" ({result['bias']})"
        lines.append(line)
    return "\n".join(lines)
