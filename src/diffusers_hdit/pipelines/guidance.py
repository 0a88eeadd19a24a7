"""Guidance: pure functions of the predictions of one step.

They act on the denoised image D, `(B, C, H, W)`. `extrapolate` may as well be given the network's raw output F: D is an
affine map of F, the same for all predictions of a step. The other functions are not linear and need D.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


def extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """
    weak + w (strong - weak), and the identity for w = 1.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, equation 6, whose w is this one less 1): weak is the
    prediction without a condition, strong the one with it. Autoguidance (Karras et al. 2024, arXiv 2406.02507, equation
    3): both have the condition, and weak comes from a smaller or less trained network.
    """
    return torch.lerp(weak, strong, scale)


def in_interval(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Whether to guide at this noise level: sigma_lo < sigma <= sigma_hi (Kynkäänniemi et al. 2024, arXiv 2404.07724,
    section 3: the weight is w inside, 1 outside). None is everywhere."""
    return interval is None or interval[0] < sigma <= interval[1]


def rescale(guided: Tensor, strong: Tensor, factor: float) -> Tensor:
    """
    Mixes the guided prediction with itself brought to the standard deviation of the unguided one, image by image (Lin et
    al. 2023, arXiv 2305.08891, equations 14 to 16): factor · guided · std(strong) / std(guided) + (1 - factor) · guided.
    """
    dims = tuple(range(1, guided.ndim))
    ratio = strong.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * torch.lerp(torch.ones_like(ratio), ratio, factor)


@dataclass(frozen=True)
class AdaptiveProjection:
    """
    The hyperparameters of adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416).

    Attributes:
        eta: share of the update along the prediction that is kept; 0 drops it, and with it the oversaturation.
        norm_threshold: r, the longest an update may be, in the 2-norm over an image; None for any length.
        momentum: β of the running sum of updates; negative values push away from where it went before.
    """

    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = 0.0

    @classmethod
    def make(cls, value: "AdaptiveProjection | Mapping | bool | None") -> "AdaptiveProjection | None":
        """
        From what a user gives: True for the defaults, a mapping with some of them, None or False for none.

        Raises:
            ValueError: for an unknown name or values out of range.
        """
        if value is None or value is False:
            return None
        if value is not True and not isinstance(value, (cls, Mapping)):
            raise ValueError(f"adaptive_projection must be True, a dict or AdaptiveProjection, got {value!r}.")
        known = set(cls.__dataclass_fields__)
        if isinstance(value, Mapping) and set(value) - known:
            raise ValueError(f"adaptive_projection takes {sorted(known)}, got {sorted(set(value) - known)}.")
        made = cls(**value) if isinstance(value, Mapping) else (cls() if value is True else value)
        threshold = made.norm_threshold
        if not 0 <= made.eta <= 1 or not -1 < made.momentum < 1 or (threshold is not None and threshold <= 0):
            raise ValueError(
                "adaptive_projection needs 0 <= eta <= 1, -1 < momentum < 1 and a positive norm_threshold or None; got "
                f"{made}."
            )
        return made


def adaptive_projected(
    weak: Tensor, strong: Tensor, scale: float, projection: AdaptiveProjection, running: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416): of the update strong - weak, with
    momentum over the steps and its length limited, the part along strong is damped by eta.

    Args:
        running: what this function returned at the step before as its second value; None at the first one.

    Returns:
        The guided prediction strong + (w - 1) · update, and the running sum for the next step.
    """
    dims = tuple(range(1, strong.ndim))
    running = strong - weak if running is None else strong - weak + projection.momentum * running
    update = running
    if projection.norm_threshold is not None:
        norm = torch.linalg.vector_norm(update, dim=dims, keepdim=True)
        update = update * (projection.norm_threshold / norm).clamp(max=1)
    unit = strong / torch.linalg.vector_norm(strong, dim=dims, keepdim=True).clamp(min=1e-12)
    parallel = (update * unit).sum(dims, keepdim=True) * unit
    return strong + (scale - 1) * (update - (1 - projection.eta) * parallel), running


@dataclass
class Guidance:
    """
    How one call of a pipeline is guided, and what adaptive projection remembers from step to step.

    Attributes:
        scale: w; 1 is no guidance.
        interval: `(sigma_lo, sigma_hi)`, None for everywhere.
        rescale: factor of `rescale`, 0 for none.
        projection: of adaptive projected guidance; None for plain extrapolation.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    projection: AdaptiveProjection | None = None
    running: Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.scale!r}.")
        interval = self.interval
        if interval is not None and not (
            isinstance(interval, Sequence) and len(interval) == 2 and 0 <= interval[0] < interval[1]
        ):
            raise ValueError(f"guidance_interval must be (sigma_lo, sigma_hi), 0 <= lo < hi; got {interval!r}.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale must be from 0 to 1, got {self.rescale}.")
        self.projection = AdaptiveProjection.make(self.projection)
        if self.scale == 1 and (self.interval is not None or self.rescale or self.projection):
            raise ValueError(
                "guidance_interval, guidance_rescale and adaptive_projection do nothing at guidance_scale=1; leave them "
                "out."
            )

    def at(self, sigma: float) -> bool:
        """Whether a step at this noise level is guided, and needs the weak prediction."""
        return self.scale != 1 and in_interval(sigma, self.interval)

    @property
    def is_linear(self) -> bool:
        return not self.rescale and self.projection is None

    def __call__(self, weak: Tensor, strong: Tensor) -> Tensor:
        """The guided prediction; `weak` and `strong` are denoised images unless `is_linear`."""
        if self.projection is None:
            guided = extrapolate(weak, strong, self.scale)
        else:
            guided, self.running = adaptive_projected(weak, strong, self.scale, self.projection, self.running)
        return rescale(guided, strong, self.rescale) if self.rescale else guided
