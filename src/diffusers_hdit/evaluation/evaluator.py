"""Measuring a model: draws images on all processes and compares them with the real ones.

Image number i is drawn from a seed of its own, and always in the same batch, whichever process draws that: several
processes get the bits that one gets. `examples/evaluate_hdit.py` and `--metrics_every` of the training share all of it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pipelines.pipeline_hdit import HDiTPipeline
from . import feature_extractors as feature_networks
from . import metrics
from .feature_extractors import FeatureExtractor
from .generate import image_seed, without_progress_bar


# ----------------------------------------------------------------------------------------------------------------------
# On all processes


def computed_by_all(
    compute: Callable[[range], tuple[Tensor, ...]], count: int, batch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """
    Batches of items 0 to count - 1, in order, on every process; each batch is computed by one of them.

    Args:
        compute: gives tensors `(len(numbers), ...)` on the process's device. Called equally often everywhere, for
            sharded networks gather their weights for all at once: a process may compute a batch that is not needed.
    """
    state = PartialState()
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    for start in range(0, len(batches), state.num_processes):
        mine = compute(batches[min(start + state.process_index, len(batches) - 1)])
        if state.num_processes == 1:
            yield mine
            continue
        everyone = []
        for value in mine:  # the last batch may be a smaller one
            padded = value.new_zeros(batch_size, *value.shape[1:])
            padded[: len(value)] = value
            everyone.append(gather(padded).unflatten(0, (state.num_processes, batch_size)))
        for i, numbers in enumerate(batches[start : start + state.num_processes]):
            yield tuple(value[i, : len(numbers)] for value in everyone)


def from_main(function: Callable[[], object]):
    """What it returns on the main process, on all of them."""
    answer = [function() if PartialState().is_main_process else None]
    return broadcast_object_list(answer)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Real images


def check_real(real) -> None:
    """
    Raises:
        ValueError: for a stream, several sizes, fewer than 4 images, or images that are not of 8 bits and 1, 3 or 4
            channels.
    """
    if not real.has_length:
        raise ValueError("real images are read more than once, which a stream does not allow: give a set on disk.")
    if len(real.sizes) > 1:
        raise ValueError(
            "the real images are brought to several sizes (buckets); drawn ones are compared at one size: open them "
            "without buckets."
        )
    if real.dtype != "uint8" or real.in_channels not in (1, 3, 4):
        raise ValueError(
            f"feature networks see 8-bit images of 1, 3 or 4 channels; these are {real.dtype} of {real.in_channels}: "
            "convert them to grey, RGB or RGBA files of 8 bits."
        )
    if len(real) < 4:
        raise ValueError(f"at least 4 real images are needed, got {len(real)}: give more of them.")


def real_images(real, numbers) -> Tensor:
    """uint8 `(B, C, H, W)`, cropped in the middle."""
    return torch.stack([real[i, (0.5, 0.5)]["image"] for i in numbers])


def default_cache_dir(cache_dir: str | None) -> Path:
    return Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "diffusers_hdit").expanduser())


def reference_features(extractor: FeatureExtractor, real, batch_size: int, cache_dir: Path) -> Tensor | None:
    """Of the real images, computed by all processes or taken from the cache; `(N, D)` on the main one, None elsewhere."""
    state, count = PartialState(), len(real)
    path, found = None, None
    if state.is_main_process:
        batches = (real_images(real, range(i, min(i + batch_size, count))) for i in range(0, count, batch_size))
        path = feature_networks.cache_file(extractor, batches, cache_dir)
        found = feature_networks.read_cache(path)
    if from_main(lambda: found is not None):
        return found
    extractor.network.to(state.device)
    compute = lambda numbers: (extractor(real_images(real, numbers).to(state.device)),)  # noqa: E731
    parts = [features.cpu() for (features,) in computed_by_all(compute, count, batch_size)]
    if not state.is_main_process:
        return None
    features = torch.cat(parts)
    feature_networks.write_cache(path, features)
    return features


# ----------------------------------------------------------------------------------------------------------------------
# Drawn images


def conditions_for(config, real, num_images: int, id2label: dict, condition_columns: dict | None) -> dict[str, Tensor]:
    """
    What the images are drawn from: labels and conditions of real images taken evenly through the set, which may be
    sorted, so in the same proportions and combinations; of real images without labels, the classes in turn.

    Args:
        config: of the network.
        real: the real images; None if nothing is taken from them, as real images without labels and conditions.
        id2label, condition_columns: of the model, as `HDiTPipeline` has them.

    Raises:
        ValueError: for a model that upscales, for real images with other classes or conditions than the model's, and for
            a model trained on conditions when they have none.
    """
    if config.conditioning_channels:
        raise ValueError(
            "this model upscales images; what is evaluated here are models that draw from noise: give one that does."
        )
    labels = None if real is None else real.labels
    measured = None if real is None else real.conditions
    places = [] if real is None else [i * len(real) // num_images for i in range(num_images)]
    conditions = {}
    if config.num_classes is None and labels is not None:
        raise ValueError("--label_column was given, but this model was trained without classes: leave it out.")
    if labels is not None:
        if dict(real.id2label) != dict(id2label):
            raise ValueError(
                f"the classes of the real images, {list(real.id2label.values())}, are not those of the model, "
                f"{list(id2label.values())}: give the images that it was trained on and the same --label_column, or "
                "leave --label_column out, and the model's classes are drawn in turn."
            )
        conditions["class_labels"] = torch.tensor([int(labels[place]) for place in places])
    elif config.num_classes is not None:
        if config.mapping_cond_dim:
            raise ValueError("this model has classes and conditions, which belong together: give --label_column too.")
        conditions["class_labels"] = torch.arange(num_images) % config.num_classes
    if not config.mapping_cond_dim:
        if measured is not None:
            raise ValueError(
                "--condition_columns were given, but this model was trained without conditions: leave them out."
            )
        return conditions
    trained = (condition_columns or {}).get("names")
    if measured is None or real.condition_columns["names"] != trained:
        given = "none were given" if measured is None else f"the real images have {real.condition_columns['names']}"
        remedy = (
            "Give these columns in --condition_columns."
            if trained
            else "Save the pipeline with condition_columns (names, mean, std), and give them in --condition_columns."
        )
        raise ValueError(
            f"this model was trained on the conditions {trained or 'of a caller, without names'}, and {given}: images "
            f"drawn from others could not be compared with the real ones. {remedy}"
        )
    values = torch.stack([torch.as_tensor(measured[place]) for place in places])
    # Where the training dropped conditions, a last entry of 1 says that there is one.
    conditions["mapping_cond"] = F.pad(values, (0, config.mapping_cond_dim - values.shape[1]), value=1.0)
    return conditions


@dataclass
class Drawing:
    """
    How the images of an evaluation are drawn.

    Attributes:
        pipeline: on this process's device.
        conditions: arguments of the pipeline, one entry an image.
        size: (height, width); None is the trained size.
        autocast: makes the context that the pipeline runs in.
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

    def images(self, numbers) -> Tensor:
        """uint8 `(B, C, H, W)` of the images with these numbers, on the device."""
        numbers, (height, width) = list(numbers), self.size or (None, None)
        with without_progress_bar(self.pipeline), self.autocast():
            images = self.pipeline(
                **{name: values[numbers] for name, values in self.conditions.items()},
                num_images_per_prompt=1 if self.conditions else len(numbers),
                height=height,
                width=width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=[torch.Generator().manual_seed(image_seed(self.seed, i)) for i in numbers],
                output_type="pt",
            ).images
        return (images.float() * 255).round().to(torch.uint8)

    @property
    def facts(self) -> dict[str, object]:
        """What a result must name besides the network and the counts."""
        scheduler = self.pipeline.scheduler
        settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        height, width = self.size or self.pipeline.transformer.sample_size
        return {
            "image_resolution": [height, width],
            "sampler": {"class": type(scheduler).__name__, **settings},
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "conditions": sorted(self.conditions),
        }


def features_of(
    drawing: Drawing,
    extractor: FeatureExtractor,
    keep_images: bool = False,
    progress: Callable = lambda batches: batches,
) -> tuple[Tensor, Tensor | None]:
    """
    Draws on all processes. No more than a batch a process is on the devices at a time.

    Returns:
        Features `(N, D)` on the CPU of every process; and with `keep_images` the images on the main one, else None.
    """
    state = PartialState()
    extractor.network.to(state.device)

    def compute(numbers):
        images = drawing.images(numbers).to(state.device)  # the pipeline may be elsewhere
        return (extractor(images), images) if keep_images else (extractor(images),)

    features, kept = [], []
    for found in progress(computed_by_all(compute, drawing.num_images, drawing.batch_size)):
        features.append(found[0].cpu())
        if keep_images and state.is_main_process:
            kept.append(found[1].cpu())
    return torch.cat(features), torch.cat(kept) if kept else None


# ----------------------------------------------------------------------------------------------------------------------
# In the middle of a training


@dataclass
class MetricsOnTheWay:
    """
    What `--metrics_every` does: the same images, seeds and real features each time.

    Attributes:
        args: metrics_every, metrics, metrics_images, metrics_steps, train_batch_size, seed, cache_dir.
        last_step: the newest step that was measured; a run that goes on does not measure it again.
    """

    args: object
    extractor: FeatureExtractor
    real: object
    last_step: int | None = None
    real_features: Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        self.names = self.args.metrics or metrics.default_metrics(self.extractor)
        metrics.check_metrics(self.names, self.extractor, images=self.args.metrics_images)
        check_real(self.real)

    def is_due(self, step: int, total_steps: int) -> bool:
        return step != self.last_step and (step % self.args.metrics_every == 0 or step == total_steps)

    def measure(self, pipeline: HDiTPipeline, step: int, autocast: Callable) -> list[dict] | None:
        """Results, as of `metrics.evaluate`, on the main process; None elsewhere. All processes must call it."""
        args, state = self.args, PartialState()
        config, count = pipeline.transformer.config, args.metrics_images
        columns = self.real.condition_columns
        conditions = conditions_for(config, self.real, count, self.real.id2label or {}, columns)
        drawing = Drawing(
            pipeline, conditions, count, args.train_batch_size, args.metrics_steps, seed=args.seed, autocast=autocast
        )
        if not from_main(lambda: self.real_features is not None):
            cache = default_cache_dir(args.cache_dir) / "features"
            self.real_features = reference_features(self.extractor, self.real, args.train_batch_size, cache)
        features, _ = features_of(drawing, self.extractor)
        self.extractor.network.to("cpu")  # its memory is the training's
        self.last_step = step
        if not state.is_main_process:
            return None
        results = metrics.evaluate(features, self.real_features, self.names, self.extractor)
        return [{**result, **drawing.facts} for result in results]


def metrics_on_the_way(args, real) -> MetricsOnTheWay | None:
    """
    None without `--metrics_every`. The random state stays as it was.

    Args:
        args: as of `MetricsOnTheWay`, and feature_network, feature_weights.
        real: the training set.

    Raises:
        ImportError, OSError: if packages or weights of the feature network are missing.
        ValueError: for a network, metrics or a set that do not fit.
    """
    if not args.metrics_every:
        return None
    with PartialState().main_process_first():  # weights may have to be fetched
        extractor = feature_networks.load_extractor(args.feature_network, weights=args.feature_weights)
    return MetricsOnTheWay(args, extractor, real)


# ----------------------------------------------------------------------------------------------------------------------
# A picture


CELL, CAPTION, MARGIN, ROW_NAME = 96, 18, 6, 96


def most_like_copies(distances: Tensor, rows: int) -> list[int]:
    """Numbers of the drawn images whose nearest real image is, relative to the second, nearest."""
    ratio = distances[:, 0] / distances[:, 1].clamp(min=torch.finfo(distances.dtype).tiny)
    return ratio.argsort(stable=True)[:rows].tolist()


def neighbors_picture(names: list[str], drawn: Tensor, nearest: Tensor, distances: Tensor) -> Image.Image:
    """
    A row for each drawn image: itself, and its nearest real ones with their distances. Near copies are framed.

    Args:
        names: of the rows.
        drawn: uint8 `(R, C, H, W)`.
        nearest: uint8 `(R, k, C, H, W)`, the nearest first.
        distances: `(R, k)`, k at least 2.
    """
    scale = max(1, -(-CELL // max(drawn.shape[-2:])))
    height, width = (scale * side for side in drawn.shape[-2:])
    columns, font = nearest.shape[1] + 1, ImageFont.load_default(size=12)
    across, down = max(width, 64) + MARGIN, height + CAPTION + MARGIN
    picture = Image.new("RGB", (ROW_NAME + columns * across + MARGIN, CAPTION + MARGIN + len(drawn) * down), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(["drawn", "nearest", *(f"number {i}" for i in range(2, columns))]):
        draw.text((ROW_NAME + column * across, MARGIN), title, fill="black", font=font)
    for row, copy in enumerate(metrics.near_copies(distances).tolist()):
        top = CAPTION + MARGIN + row * down
        draw.text((MARGIN, top + height // 2), names[row], fill="black", font=font, anchor="lm")
        for column, pixels in enumerate([drawn[row], *nearest[row]]):
            left = ROW_NAME + column * across
            picture.paste(as_picture(pixels).resize((width, height), Image.Resampling.BICUBIC), (left, top))
            if column:
                draw.text((left, top + height + 1), f"{distances[row, column - 1]:.4g}", fill="black", font=font)
        if copy:
            frame = (ROW_NAME - 2, top - 2, ROW_NAME + across + width + 1, top + height + 1)
            draw.rectangle(frame, outline="red", width=2)
            draw.text((ROW_NAME, top + height + 1), "near copy", fill="red", font=font)
    return picture


def as_picture(pixels: Tensor) -> Image.Image:
    """RGB of uint8 `(1|3|4, H, W)`, transparency on white."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
