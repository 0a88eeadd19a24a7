"""Checks of a network's configuration and inputs, shared by `HDiTModel` and the baselines. All raise ValueError."""

import inspect
import math
import numbers
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

import torch
from torch import Tensor, nn

from ..ops.derivatives import is_transformed


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Level:
    """The configuration of one level of the hourglass, with all defaults filled in."""

    width: int
    depth: int
    ff_width: int
    type: str
    head_dim: int
    kernel_size: int
    window_size: int
    dropout: float
    position_embedding: str = "rope"
    activation: str = "geglu"
    norm: str = "ada_rms_norm"

    @property
    def heads(self) -> int:
        """The number of attention heads; 0 for a level without attention."""
        return 0 if self.type == "none" else self.width // self.head_dim

    @property
    def rotary(self) -> bool:
        """Whether there are queries and keys that are rotated."""
        return self.heads > 0 and self.position_embedding == "rope"

    def check(self, where: str) -> None:
        if self.width < 1 or self.depth < 0 or self.ff_width < 1:
            raise ValueError(
                f"{where}: width and feed-forward width must be positive and the depth not negative; got width "
                f"{self.width}, feed-forward width {self.ff_width}, depth {self.depth}."
            )
        if self.type == "none":
            return
        if self.head_dim < 8 or self.head_dim % 8 or self.width % self.head_dim:
            raise ValueError(
                f"{where}: attention_head_dim {self.head_dim} must be a multiple of 8 that divides the width "
                f"{self.width}."
            )
        if self.type in ("neighborhood", "sliding_window") and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise ValueError(f"{where}: kernel_size must be odd and positive, got {self.kernel_size}.")
        if self.type == "shifted_window" and self.window_size < 1:
            raise ValueError(f"{where}: window_size must be positive, got {self.window_size}.")


# The arguments of `HDiTModel` that hold for one level each, in the order of the fields of `Level`.
LEVEL_ARGUMENTS = (
    "widths", "depths", "ff_widths", "attention_types", "attention_head_dim", "kernel_size", "window_size", "dropout",
    "position_embedding", "activation", "norm",
)  # fmt: skip


def check_types(model: nn.Module, other: Collection[str] = ()) -> None:
    """Check the configuration of a network against the annotations of its `__init__`, but for `other` arguments."""
    for name, parameter in inspect.signature(type(model).__init__).parameters.items():
        value = model.config.get(name)
        if name in model.config and name not in other and not has_type(value, parameter.annotation):
            wanted = getattr(parameter.annotation, "__name__", None) or str(parameter.annotation)
            raise ValueError(f"{name} must be {wanted.replace('collections.abc.', '')}, got {value!r}.")


def has_type(value: object, annotation: object) -> bool:
    """Return whether a value is of an annotated type; lists and tuples are alike, and a bool is no number."""
    inner = get_args(annotation)
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return any(has_type(value, member) for member in inner)
    if inner:  # tuple[int, int] or Sequence[int]
        if not isinstance(value, (list, tuple)):
            return False
        members = inner if get_origin(annotation) is tuple else inner * len(value)
        return len(value) == len(members) and all(map(has_type, value, members))
    if annotation in (int, float):
        number = numbers.Integral if annotation is int else numbers.Real
        is_number = isinstance(value, number) and not isinstance(value, bool)
        return is_number and not (isinstance(value, float) and not math.isfinite(value))
    return annotation in (inspect.Parameter.empty, Any) or isinstance(value, annotation)


def resolve_levels(config: Mapping, allowed_types: Sequence[str]) -> list[Level]:
    """Fill in the defaults of the per-level arguments of `HDiTModel`, and check them against each other."""
    widths, count = config["widths"], len(config["widths"])
    if count == 0:
        raise ValueError("widths is empty; a model needs at least one level.")
    defaults = {
        "ff_widths": [3 * width for width in widths],
        "attention_types": ["neighborhood"] * (count - 1) + ["global"],
    }

    def per_level(name: str) -> list:
        value = defaults[name] if config[name] is None else config[name]
        if not isinstance(value, (list, tuple)):
            return [value] * count
        if len(value) != count:
            raise ValueError(
                f"{name} has {len(value)} entries, but widths has {count}: {name}={list(value)}, "
                f"widths={list(widths)}. Give one entry per level."
            )
        return list(value)

    levels = [Level(*row) for row in zip(*map(per_level, LEVEL_ARGUMENTS), strict=True)]
    for i, level in enumerate(levels):
        check_choice(f"attention_types[{i}]", level.type, allowed_types)
        level.check(f"level {i}")
    return levels


def check_design_choices(config: Mapping, levels: Sequence[Level], allowed: Mapping[str, Sequence]) -> None:
    """Check that the choices exist, and that they are about something that the model has."""
    for name, choices in allowed.items():
        check_choice(name, config[name], choices)
    if len(levels) == 1 and config["skip"] != "lerp":
        raise ValueError(f"skip={config['skip']!r} was given, but a model of one level has no skips. Leave it out.")
    if config["position_embedding"] == "none" and not any(level.heads for level in levels):
        raise ValueError(
            "position_embedding='none' leaves out the rotations of queries and keys, but no level of this model has "
            "attention. Leave it out, or give a level another attention type."
        )


def check_choice(name: str, value: str | bool, allowed: Sequence) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def check_counts(config: Mapping, *names: str) -> None:
    """Check that channels, classes and the arguments `names` are positive, and sizes of conditions not negative."""
    for name in ("in_channels", "out_channels", "num_classes", *names):
        check_at_least(1, name, config[name])
    for name in ("augment_cond_dim", "mapping_cond_dim", "conditioning_channels"):
        check_at_least(0, name, config[name])


def check_at_least(least: int, name: str, value: int | None) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of an argument that is one number for both or two of them."""
    height, width = (value, value) if isinstance(value, int) else value
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be positive, got {value}.")
    return height, width


# ----------------------------------------------------------------------------------------------------------------------
# Inputs of `forward`


def check_inputs(
    model: nn.Module,
    sample: Tensor,
    class_labels: Tensor | None,
    augment_cond: Tensor | None,
    mapping_cond: Tensor | None,
    conditioning_image: Tensor | None,
) -> None:
    """Check the shapes of a network's inputs, and the values of the labels, against its configuration."""
    config = model.config
    if sample.ndim != 4 or sample.shape[1] != config["in_channels"]:
        raise ValueError(
            f"sample must have shape (batch, {config['in_channels']}, height, width), got {tuple(sample.shape)}."
        )
    model.check_size(*sample.shape[-2:])
    batch, channels = len(sample), config["conditioning_channels"]
    expected = (batch, channels, *sample.shape[-2:]) if channels else None
    given = None if conditioning_image is None else tuple(conditioning_image.shape)
    if given != expected:
        raise ValueError(
            f"conditioning_image must {f'have shape {expected}' if expected else 'be left out'} for this model with "
            f"conditioning_channels={channels}, got {'none' if given is None else given}."
        )
    if class_labels is not None:
        check_class_labels(class_labels, batch, config["num_classes"])
    for name, value in (("augment_cond", augment_cond), ("mapping_cond", mapping_cond)):
        dim = config[f"{name}_dim"]
        if value is not None and not dim:
            raise ValueError(f"{name} was given, but this model has {name}_dim=0. Leave it out.")
        if value is not None and tuple(value.shape) != (batch, dim):
            raise ValueError(
                f"{name} must have shape ({batch}, {dim}) for this model with {name}_dim={dim}, got "
                f"{tuple(value.shape)}."
            )


def check_class_labels(class_labels: Tensor, batch: int, num_classes: int | None) -> None:
    """Check that the labels are `(batch,)` numbers from 0 to `num_classes`, which means "no label"."""
    if num_classes is None:
        raise ValueError("class_labels were given, but this model has num_classes=None. Leave them out.")
    if class_labels.shape != (batch,):
        raise ValueError(f"class_labels must have shape ({batch},), got {tuple(class_labels.shape)}.")
    # Looking at values on an accelerator would make every step wait for it; under vmap there is nothing to look at.
    if class_labels.device.type == "cpu" and not (torch.compiler.is_compiling() or is_transformed(class_labels)):
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < 0 or high > num_classes:
            raise ValueError(
                f"class_labels must be 0 to {num_classes - 1}, or {num_classes} for no label; "
                f"got values from {low} to {high}."
            )


def check_self_cond(config: Mapping, sample: Tensor, self_cond: Tensor | None) -> None:
    """Check that an earlier estimate is given only to a model that takes one, and has the shape of the sample."""
    if self_cond is None:
        return
    if not config["self_conditioning"]:
        raise ValueError(
            "self_cond was given, but this model has self_conditioning=False: it takes no earlier estimate. Leave it "
            "out, or train a model that is made with self_conditioning=True."
        )
    if self_cond.shape != sample.shape:
        raise ValueError(
            f"self_cond must have the shape of the sample, {tuple(sample.shape)}, got {tuple(self_cond.shape)}."
        )
