"""The probability-flow ODE: images to noise and back, interpolation between noises, exact likelihoods.

The ODE is dx/dsigma = (x - D(x; sigma)) / sigma (Song et al. 2021, arXiv 2011.13456; Karras et al. 2022, arXiv
2206.00364, equation 1 with the score of equation 3). It is solved over u = ln(sigma), where it reads dx/du = x - D, by the
classical Runge-Kutta method of fourth order: four evaluations a step.

A `denoiser` is any function `denoiser(x, sigma) -> D` of `(B, C, H, W)` and a number; `denoiser_of` makes one.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .. import diffusion


Denoiser = Callable[[Tensor, float], Tensor]


def denoiser_of(
    pipeline: DiffusionPipeline,
    class_labels: int | str | Sequence | Tensor | None = None,
    mapping_cond: Tensor | Mapping | None = None,
    **images: Tensor,
) -> Denoiser:
    """
    Return the denoiser of an `HDiTPipeline`, without guidance.

    A model with self_conditioning is shown no earlier estimate: then D is a function of x and sigma, as the ODE needs it,
    and the network was trained so half of the time. The pipeline, which passes its estimates on, does not generate the
    same image from the same noise.

    Args:
        class_labels, mapping_cond: as in the pipeline's call; one, or one for each image.
        **images: a `conditioning_image` for a model that takes one.

    Raises:
        ValueError: for conditions that the model does not take, or a cache, with which its output is no function of x.
    """
    if pipeline.transformer.is_cache_enabled:
        raise ValueError("the ODE needs the network itself; call pipe.transformer.disable_cache() first.")
    conditions, batch_size = pipeline.encode_conditions(class_labels, mapping_cond, 1, **images)

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        if batch_size not in (1, len(x)):
            raise ValueError(f"the denoiser has conditions for {batch_size} images, but got {len(x)}.")
        given = {name: value.expand(len(x), *value.shape[1:]) for name, value in conditions.items()}
        return diffusion.denoise(pipeline.transformer, x, sigma, pipeline.scheduler.config.sigma_data, **given)

    return denoiser


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """
    Spherical interpolation from a (t=0) to b (t=1) of noises `(B, C, H, W)`, image by image (Shoemake 1985): where a
    straight line would pass through noise of less than unit variance, which no model was trained on, this does not.

    Args:
        t: a number, or one for each image, `(B,)`.

    Raises:
        ValueError: for noises of different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp needs noises of one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    shape = (-1, *(1,) * (a.ndim - 1))
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device).reshape(shape)
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos().reshape(shape)
    sine = angle.sin()
    straight = sine < 1e-6  # parallel: the formula is 0 / 0, and the line is the arc
    sine = torch.where(straight, torch.ones_like(sine), sine)
    weight_a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    weight_b = torch.where(straight, t, (t * angle).sin() / sine)
    return weight_a * a + weight_b * b


@torch.no_grad()
def image_to_noise(denoiser: Denoiser, image: Tensor, sigma_min: float, sigma_max: float, steps: int = 50) -> Tensor:
    """
    Return the noise from which the ODE generates an image: deterministic inversion.

    Args:
        image: `(B, C, H, W)` in [-1, 1], taken as a sample at sigma_min.
        sigma_min, sigma_max: of the training, see the scheduler's config.
        steps: of four evaluations each.

    Returns:
        `(B, C, H, W)` of about unit variance: x(sigma_max) / sigma_max. `noise_to_image` is the way back, and a pipeline
        takes it as `latents`.
    """
    check_levels(sigma_min, sigma_max, steps)
    return solve(_slope(denoiser), image, math.log(sigma_min), math.log(sigma_max), steps) / sigma_max


@torch.no_grad()
def noise_to_image(denoiser: Denoiser, noise: Tensor, sigma_min: float, sigma_max: float, steps: int = 50) -> Tensor:
    """The image at sigma_min that the ODE draws from unit-variance noise; see `image_to_noise`."""
    check_levels(sigma_min, sigma_max, steps)
    return solve(_slope(denoiser), sigma_max * noise, math.log(sigma_max), math.log(sigma_min), steps)


def log_likelihood(
    denoiser: Denoiser,
    image: Tensor,
    sigma_min: float,
    sigma_max: float,
    steps: int = 50,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    ln p(image) under the model, `(B,)` in nats: the density of x at sigma_min, by the change of variables along the ODE
    (Song et al. 2021, arXiv 2011.13456, appendix D.2). The divergence is Hutchinson's estimate v · J v with random signs
    v, the same along the way: unbiased, exact for diagonal J.

    Args:
        image: `(B, C, H, W)` in [-1, 1], as a sample at sigma_min. Images of 8 bits want uniform noise of one grey level
            added, or a sigma_min that covers it, since they have no density.
        steps: of four evaluations each.
        probes: number of v to average over.
        generator: of v, on the image's device.

    Returns:
        See `bits_per_dimension`.
    """
    check_levels(sigma_min, sigma_max, steps)
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}.")
    signs = [
        torch.randint(0, 2, image.shape, generator=generator, device=image.device).to(image.dtype) * 2 - 1
        for _ in range(probes)
    ]

    def slope(state: tuple[Tensor, Tensor], u: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = x - denoiser(x, math.exp(u))
            products = [
                (torch.autograd.grad(velocity, x, v, retain_graph=v is not signs[-1])[0] * v).flatten(1).sum(1)
                for v in signs
            ]
        return velocity.detach(), torch.stack(products).mean(0)

    # Sums over many dimensions: in float64 they cost nothing.
    state = (image, torch.zeros(len(image), dtype=torch.float64, device=image.device))
    x, divergence = solve(slope, state, math.log(sigma_min), math.log(sigma_max), steps)
    dimensions = x[0].numel()
    prior = -0.5 * (x.double() / sigma_max).square().flatten(1).sum(1)
    prior = prior - dimensions * (math.log(sigma_max) + 0.5 * math.log(2 * math.pi))
    return prior + divergence


def bits_per_dimension(log_likelihood: Tensor, image_shape: tuple[int, ...], levels: int = 256) -> Tensor:
    """
    Of ln p in nats for values in [-1, 1], as if for values in steps of one grey level: -ln p / (n ln 2) + log2(127.5) for
    256 levels and n values an image.

    Args:
        image_shape: `(C, H, W)`.
    """
    return -log_likelihood / (math.prod(image_shape) * math.log(2)) + math.log2((levels - 1) / 2)


# ----------------------------------------------------------------------------------------------------------------------


def check_levels(sigma_min: float, sigma_max: float, steps: int) -> None:
    if not 0 < sigma_min < sigma_max or steps < 1:
        raise ValueError(
            f"need 0 < sigma_min < sigma_max and at least one step, got sigma_min={sigma_min}, sigma_max={sigma_max}, "
            f"steps={steps}."
        )


State = Tensor | tuple[Tensor, ...]


def solve(slope: Callable, state: State, begin: float, end: float, steps: int) -> State:
    """Solve dy/du = slope(y, u) from `begin` to `end` with the classical Runge-Kutta method; y has one or more tensors."""
    single = isinstance(state, Tensor)
    function = (lambda y, u: (slope(y[0], u),)) if single else slope
    y, h = ((state,) if single else state), (end - begin) / steps

    def moved(y, k, distance):
        return tuple(a + distance * b for a, b in zip(y, k, strict=True))

    for i in range(steps):
        u = begin + i * h
        k1 = function(y, u)
        k2 = function(moved(y, k1, h / 2), u + h / 2)
        k3 = function(moved(y, k2, h / 2), u + h / 2)
        k4 = function(moved(y, k3, h), u + h)
        total = tuple(a + 2 * b + 2 * c + d for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
        y = moved(y, total, h / 6)
    return y[0] if single else y


def _slope(denoiser: Denoiser) -> Callable:
    return lambda x, u: x - denoiser(x, math.exp(u))
