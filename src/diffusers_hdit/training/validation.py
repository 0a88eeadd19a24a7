"""Validation images of a training run, and grids of them."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from ..data import to_float
from ..pipelines.conditions import append_presence_flag
from ..pipelines.pipeline_hdit import HDiTPipeline
from ..pipelines.upscaling import downscale
from ..utils.seeding import mixed_seed
from .config import TrainingConfig


VALIDATION_INFERENCE_STEPS = 50


def generate_validation_images(
    pipeline: HDiTPipeline,
    conditions: dict[str, Tensor],
    num_images: int,
    seed: int,
    batch_size: int,
    accelerator: Accelerator,
    callback_on_step_end: Callable | None = None,
) -> Tensor | None:
    """
    Generate images from the same noise and conditions each time, so that grids of different steps can be compared.

    Image i depends on (seed, i) and the weights, whatever the batch size or the number of processes. Each process
    generates its share.

    Args:
        conditions: `num_images` of each argument of the pipeline, from `validation_conditions`.
        callback_on_step_end: of the pipeline.

    Returns:
        `(num_images, C, H, W)` in [0, 1] on the main process's host, None on the others.
    """
    pipeline.set_progress_bar_config(disable=True)
    world = accelerator.num_processes
    # All generate equally many, the last ones twice if need be: sharded weights are gathered for all at once.
    mine = [i % num_images for i in range(accelerator.process_index, -(-num_images // world) * world, world)]
    generated = []
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        # Autocast as in training: sharded networks do not bring it with them.
        with accelerator.autocast():
            images = pipeline(
                **{name: values[batch] for name, values in conditions.items()},
                num_images_per_prompt=1 if conditions else len(batch),
                num_inference_steps=VALIDATION_INFERENCE_STEPS,
                generator=[torch.Generator().manual_seed(mixed_seed("validation", seed, i)) for i in batch],
                output_type="pt",
                callback_on_step_end=callback_on_step_end,
            ).images
        generated.append(images)
    images = accelerator.gather(torch.cat(generated).contiguous())
    if not accelerator.is_main_process:
        return None
    return images.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:num_images].cpu()


def validation_conditions(dataset, num_images: int, config: TrainingConfig) -> dict[str, Tensor]:
    """
    Return the conditions of the validation images: the classes in turn; the numbers that come with the first images (for
    a stream: the means); and, for super-resolution, the first images at low resolution.

    Raises:
        ValueError: for super-resolution of a stream, whose first images are not at hand.
    """
    conditions, places = {}, []
    if dataset.has_length:  # with buckets, those that have the size of the first one
        alike = [i for i in range(min(len(dataset), 64 * num_images)) if dataset.size_of(i) == dataset.size_of(0)]
        places = [alike[i % len(alike)] for i in range(num_images)]
    if dataset.id2label:
        conditions["class_labels"] = torch.arange(num_images) % len(dataset.id2label)
    if dataset.condition_columns is not None:
        values = torch.zeros(num_images, len(dataset.condition_columns["names"]))
        for i, place in enumerate(places):
            values[i] = torch.as_tensor(dataset.conditions[place])
        conditions["mapping_cond"] = append_presence_flag(values)
    if config.task == "upscale":
        if not dataset.has_length:
            raise ValueError(
                "--task upscale validates on the first images, which --streaming does not keep: leave --streaming out."
            )
        middle = (0.5, 0.5)
        images = torch.stack([to_float(dataset[place, middle]["image"]) for place in places])
        conditions["image"] = downscale(images, config.upscale_factor) / 2 + 0.5
        if dataset.labels is not None:
            conditions["class_labels"] = torch.tensor([int(dataset.labels[place]) for place in places])
    return conditions


def save_image_grid(images: Tensor, path: Path) -> Image.Image:
    """
    Write images `(B, C, H, W)` in [0, 1] as a grid of as many columns as rows, or more, and return it. Channels that are
    no colours (2, or more than 4) are shown side by side, in grey.
    """
    if images.shape[1] not in (1, 3, 4):
        images = images.transpose(1, 2).flatten(2)[:, None]
    tiles = VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).float().numpy())
    rows = next(n for n in range(math.isqrt(len(images)), 0, -1) if len(images) % n == 0)
    path.parent.mkdir(exist_ok=True)
    grid = make_image_grid(tiles, rows=rows, cols=len(images) // rows)
    grid.save(path)
    return grid


def log_grid(accelerator: Accelerator, grid: Image.Image, step: int) -> None:
    """Send a grid of images to every tracker, on the main process."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(grid.convert("RGB"))
            tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [grid]}, step=step)
        elif tracker.name == "trackio":  # accelerate 1.15 has no log_images for it
            import trackio

            tracker.log({"samples": trackio.Image(grid)}, step=step)
