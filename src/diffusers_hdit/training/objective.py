"""The training objective: what is random in a step, and the loss.

Everything random but the network's dropout is a function of (seed, number of the image in the run), so that a run does
not depend on how its batches are divided among processes and accumulation steps, and a resumed run repeats the numbers.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import diffusion
from ..data import to_float
from ..pipelines.conditions import append_presence_flag
from ..pipelines.upscaling import training_conditioning
from ..utils.seeding import mixed_seed
from .augmentation import augment, to_device
from .config import TrainingConfig


def image_generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """Return a generator for each image, seeded by (seed, number of the image in the run)."""
    return [torch.Generator().manual_seed(mixed_seed("image", seed, number)) for number in numbers]


def sample_noise(
    shape: Sequence[int], seed: int, numbers: Sequence[int], device: torch.device, purpose: str = "noise"
) -> Tensor:
    """Return unit-variance noise `(B, C, H, W)`, each image's a function of (seed, number in the run, purpose)."""
    noise, generator = torch.empty(shape, device=device), torch.Generator(device)
    for row, number in zip(noise, numbers, strict=True):
        row.normal_(generator=generator.manual_seed(mixed_seed(purpose, seed, number)))
    return noise


def seed_dropout(seed: int, number: int) -> None:
    """Make the network's dropout a function of (seed, number of this process's first image)."""
    torch.manual_seed(mixed_seed("dropout", seed, number))


def sample_and_compute_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    device: torch.device,
    config: TrainingConfig,
    *,
    num_classes: int | None,
    image_size: int,
    strata: dict,
    autocast: Callable = contextlib.nullcontext,
    self_conditioning: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Sample noise levels, noise, flips, augmentations and dropped conditions for a batch, and compute its loss.

    Args:
        batch: "image" `(B, C, H, W)` as the loader gives it, "number" `(B,)`; "label" `(B,)`, "mapping_cond" `(B, D)`.
        image_size: longer side in pixels, for the noise density.
        strata: this process's place in the global batch, arguments of `diffusion.stratified_uniform`.
        autocast: makes the context that the network runs in; images and noise are made in float32.
        self_conditioning: whether the model has it. Half of the images are then shown an earlier estimate.

    Returns:
        The loss of each image `(B,)` and its sigma `(B,)`, on the device.
    """
    numbers = batch["number"].tolist()
    generators = image_generators(config.seed, numbers)
    u = diffusion.stratified_uniform(len(numbers), **strata, generator=generators)
    flipped, dropped = torch.stack([torch.rand(2, generator=g) for g in generators]).unbind(1)
    flipped, dropped = to_device(device, flipped < 0.5), to_device(device, dropped < config.label_dropout)
    sigma = diffusion.sigma_from_uniform(
        u, config.noise_density, image_size=image_size, sigma_data=config.sigma_data, **config.noise_density_params
    )
    sigma = to_device(device, sigma.float())

    image = to_float(to_device(device, batch["image"]))
    conditions = {}
    if config.augment_prob:
        image, conditions["augment_cond"] = augment(image, config.augment_prob, generators)
    elif config.random_flip:
        image = torch.where(flipped[:, None, None, None], image.flip(3), image)
    if "label" in batch:
        conditions["class_labels"] = torch.where(dropped, num_classes, to_device(device, batch["label"]))
    if "mapping_cond" in batch:
        values = append_presence_flag(to_device(device, batch["mapping_cond"]))
        conditions["mapping_cond"] = torch.where(dropped[:, None], 0.0, values)
    if config.task == "upscale":
        level = config.max_conditioning_noise * torch.cat([torch.rand(1, generator=g) for g in generators])
        noise = sample_noise(image.shape, config.seed, numbers, device, purpose="conditioning noise")
        conditions["conditioning_image"] = training_conditioning(
            image, config.upscale_factor, to_device(device, level), noise
        )
    shown = None
    if self_conditioning:  # the last number of the generators: the others are those of a model without it
        shown = to_device(device, torch.cat([torch.rand(1, generator=g) for g in generators]) < 0.5)
    noise = sample_noise(image.shape, config.seed, numbers, device)
    with autocast():
        losses = diffusion.loss(
            model, image, noise, sigma, config.sigma_data, config.loss_weighting, shown, **conditions
        )
    return losses, sigma
