"""Reads the configuration of the network: checks the per-level arguments of `HDiTModel`, and fills in the defaults."""

from collections.abc import Sequence
from dataclasses import dataclass


ATTENTION_TYPES = ("neighborhood", "global", "shifted_window", "none", "axial", "sliding_window")
# Parts that are one for all levels; the first is the paper's.
PARTS = {
    "position_embedding": ("rope", "additive", "none"),
    "skip": ("lerp", "add", "concat"),
    "activation": ("geglu", "gelu"),
    "norm": ("ada_rms_norm", "ada_layer_norm"),
    "self_conditioning": (False, True),
}


@dataclass
class Level:
    """One level of the hourglass, all defaults filled in. `heads` is 0 where there is no attention."""

    width: int
    depth: int
    ff_width: int
    type: str
    head_dim: int
    kernel_size: int
    window_size: int
    dropout: float
    rotary: bool = True
    activation: str = "geglu"
    norm: str = "ada_rms_norm"

    @property
    def heads(self) -> int:
        return 0 if self.type == "none" else self.width // self.head_dim

    def check(self, index: int) -> None:
        where = f"level {index}"
        if self.type not in ATTENTION_TYPES:
            raise ValueError(
                f"attention_types[{index}] is {self.type!r}; allowed are {', '.join(map(repr, ATTENTION_TYPES))}."
            )
        if self.width < 1 or self.depth < 0 or self.ff_width < 1:
            raise ValueError(
                f"{where}: width and feed-forward width must be positive and the depth not negative; got width "
                f"{self.width}, feed-forward width {self.ff_width}, depth {self.depth}."
            )
        if self.type == "none":
            return
        if self.head_dim < 8 or self.head_dim % 8 or self.width % self.head_dim:
            raise ValueError(
                f"{where}: attention_head_dim {self.head_dim} must be a multiple of 8 that divides the width {self.width}."
            )
        if self.type in ("neighborhood", "sliding_window") and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise ValueError(f"{where}: kernel_size must be odd and positive, got {self.kernel_size}.")
        if self.type == "shifted_window" and self.window_size < 1:
            raise ValueError(f"{where}: window_size must be positive, got {self.window_size}.")


def resolve_levels(
    widths,
    depths,
    ff_widths,
    attention_types,
    attention_head_dim,
    kernel_size,
    window_size,
    dropout,
    position_embedding="rope",
    activation="geglu",
    norm="ada_rms_norm",
) -> list[Level]:
    """Checks the per-level arguments of `HDiTModel` against each other and fills in the defaults."""
    count = len(widths)
    if count == 0:
        raise ValueError("widths is empty; a model needs at least one level.")

    def per_level(name: str, value) -> list:
        if not isinstance(value, (list, tuple)):
            return [value] * count
        if len(value) != count:
            raise ValueError(
                f"{name} has {len(value)} entries, but widths has {count}: {name}={list(value)}, widths={list(widths)}. "
                f"Give one entry a level."
            )
        return list(value)

    if ff_widths is None:
        ff_widths = [3 * width for width in widths]
    if attention_types is None:
        attention_types = ["neighborhood"] * (count - 1) + ["global"]
    if isinstance(attention_types, str):
        attention_types = [attention_types] * count
    columns = {
        "widths": widths,
        "depths": depths,
        "ff_widths": ff_widths,
        "attention_types": attention_types,
        "attention_head_dim": attention_head_dim,
        "kernel_size": kernel_size,
        "window_size": window_size,
        "dropout": dropout,
        "rotary": position_embedding == "rope",
        "activation": activation,
        "norm": norm,
    }
    levels = [Level(*row) for row in zip(*(per_level(name, value) for name, value in columns.items()), strict=True)]
    for i, level in enumerate(levels):
        level.check(i)
    return levels


def check_parts(levels: Sequence[Level], **parts: str | bool) -> None:
    """
    Args:
        parts: a choice for each of `PARTS`.

    Raises:
        ValueError: for a choice that does not exist, or that exchanges a part which the model does not have.
    """
    for name, value in parts.items():
        if value not in PARTS[name]:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, PARTS[name]))}.")
    if len(levels) == 1 and parts["skip"] != "lerp":
        raise ValueError(f"skip={parts['skip']!r} was given, but a model of one level has no skips. Leave it out.")
    if parts["position_embedding"] == "none" and not any(level.heads for level in levels):
        raise ValueError(
            "position_embedding='none' leaves out the rotations of queries and keys, but no level of this model has "
            "attention. Leave it out, or give a level another attention type."
        )


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be positive, got {value}.")
    return height, width
