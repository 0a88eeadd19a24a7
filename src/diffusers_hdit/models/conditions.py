"""Checks of what a network is conditioned on, in the words of its configuration."""

import torch
from torch import Tensor


def check_class_labels(class_labels: Tensor | None, batch: int, num_classes: int | None) -> None:
    """Raises ValueError unless `class_labels` are None, or `(batch,)` numbers from 0 to `num_classes` (no label)."""
    if class_labels is None:
        return
    if num_classes is None:
        raise ValueError("class_labels were given, but this model has num_classes=None. Leave them out.")
    if class_labels.shape != (batch,):
        raise ValueError(f"class_labels must have shape ({batch},), got {tuple(class_labels.shape)}.")
    # Looking at values on an accelerator would make every step wait for it.
    if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < 0 or high > num_classes:
            raise ValueError(
                f"class_labels must be 0 to {num_classes - 1}, or {num_classes} for no label; "
                f"got values from {low} to {high}."
            )


def check_vector(name: str, value: Tensor | None, batch: int, dim: int) -> None:
    """Raises ValueError unless the condition `name` is None, or of shape `(batch, dim)` for a `dim` over 0."""
    if value is not None and not dim:
        raise ValueError(f"{name} was given, but this model has {name}_dim=0. Leave it out.")
    if value is not None and tuple(value.shape) != (batch, dim):
        raise ValueError(
            f"{name} must have shape ({batch}, {dim}) for this model with {name}_dim={dim}, got {tuple(value.shape)}."
        )


def check_conditioning_image(sample: Tensor, conditioning_image: Tensor | None, channels: int) -> None:
    """Raises ValueError unless there is a `conditioning_image` of the sample's size, or none for 0 `channels`."""
    expected = (sample.shape[0], channels, *sample.shape[-2:]) if channels else None
    given = None if conditioning_image is None else tuple(conditioning_image.shape)
    if given != expected:
        raise ValueError(
            f"conditioning_image must {f'have shape {expected}' if expected else 'be left out'} for this model with "
            f"conditioning_channels={channels}, got {'none' if given is None else given}."
        )
