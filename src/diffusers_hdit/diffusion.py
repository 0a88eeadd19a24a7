"""The mathematics of training: EDM preconditioning, noise densities and loss weightings.

σ is the standard deviation of the noise, σd (`sigma_data`) that of the images. Equation numbers are those of Karras et
al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364, unless said otherwise.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


# ----------------------------------------------------------------------------------------------------------------------
# Preconditioning (table 1, column "Ours")


def c_skip(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def c_in(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    return 1 / (sigma**2 + sigma_data**2).sqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """The `timestep` of `HDiTModel`."""
    return sigma.log() / 4


def precondition(model: Callable, noised: Tensor, sigma: Tensor, sigma_data: float, model_kwargs: dict) -> Tensor:
    """Return F, the raw output of the network for the noised image, at least float32, of the image's shape."""
    output = model(_like(noised, c_in(sigma, sigma_data)) * noised, c_noise(sigma), return_dict=False, **model_kwargs)[
        0
    ]
    return output.to(noised.dtype)


def denoise(model: Callable, noised: Tensor, sigma: Tensor, sigma_data: float = 0.5, **model_kwargs) -> Tensor:
    """
    Return the denoised image D(x; σ) = c_skip x + c_out F(c_in x; c_noise) (equation 7).

    Args:
        model: an `HDiTModel`, or anything that is called like one.
        noised: image + σ·noise, `(B, C, H, W)`.
        sigma: `(B,)` or a number.

    Returns:
        `(B, C, H, W)`, at least float32 whatever dtype the model runs in.
    """
    noised, sigma = _float32(noised), _per_sample(sigma, noised)
    output = precondition(model, noised, sigma, sigma_data, model_kwargs)
    return _like(noised, c_skip(sigma, sigma_data)) * noised + _like(noised, c_out(sigma, sigma_data)) * output


def earlier_estimate(
    model: Callable, noised: Tensor, sigma: Tensor, shown: Tensor, sigma_data: float = 0.5, **model_kwargs
) -> Tensor:
    """
    Return what self-conditioning shows the network in training (Chen et al. 2022, arXiv 2208.04202, algorithm 1): the
    denoised image of a pass that is shown nothing, without its gradient.

    The pass is for the whole batch, whoever is `shown` it: so all processes take part in the same collectives, and
    compiled networks see one batch size.

    Args:
        model, noised, sigma, sigma_data, **model_kwargs: as in `denoise`.
        shown: `(B,)` booleans.

    Returns:
        `self_cond` for the model, `(B, C, H, W)`, at least float32: D where `shown`, zeros elsewhere.
    """
    with torch.no_grad():
        estimate = denoise(model, noised, sigma, sigma_data, **model_kwargs)
    # Older PyTorch's autocast would use the weights that it cast here again, where they need gradients (2.6 does).
    torch.clear_autocast_cache()
    return torch.where(_like(estimate, shown), estimate, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Loss: mean((F - target)²) · w(σ). On the denoised image the weight is w(σ) / c_out².


def _soft_min_snr(sigma: Tensor, sigma_data: float) -> Tensor:
    """Crowson et al. 2024, arXiv 2401.11605: 1 / (σ² + σd²) on the denoised image, a smooth min(SNR, γ) with γ = 1/σd²."""
    return (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2


def _min_snr(sigma: Tensor, sigma_data: float) -> Tensor:
    """Hang et al. 2023, arXiv 2303.09556: min(1/σ², γ) on the denoised image, with the same γ = 1/σd²."""
    return (1 / sigma**2).clamp(max=1 / sigma_data**2) * c_out(sigma, sigma_data) ** 2


def _snr(sigma: Tensor, sigma_data: float) -> Tensor:
    """1/σ² on the denoised image: the loss of ε-prediction."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def _karras(sigma: Tensor, sigma_data: float) -> Tensor:
    """Equation 8: the network's own error, unweighted."""
    return torch.ones_like(sigma)


WEIGHTINGS = {"soft-min-snr": _soft_min_snr, "min-snr": _min_snr, "snr": _snr, "karras": _karras}


def loss(
    model: Callable,
    image: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
    weighting: str = "soft-min-snr",
    self_conditioned: Tensor | None = None,
    **model_kwargs,
) -> Tensor:
    """
    The training loss of each sample, `(B,)` float32 (float64 if the images are).

    Args:
        model: an `HDiTModel`, or anything that is called like one.
        image: `(B, C, H, W)` in [-1, 1].
        noise: unit-variance noise, `(B, C, H, W)`.
        sigma: `(B,)`.
        weighting: "soft-min-snr" (the paper's), "min-snr" (γ = 1/σd²), "snr" or "karras".
        self_conditioned: for a model with self_conditioning, `(B,)` booleans: which samples are shown an
            `earlier_estimate`; none of them if not given.
        **model_kwargs: conditions for the model.

    Raises:
        ValueError: for an unknown weighting or tensors of different shapes.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(map(repr, WEIGHTINGS))}; got {weighting!r}.")
    if image.shape != noise.shape:
        raise ValueError(f"image and noise must have one shape, got {tuple(image.shape)} and {tuple(noise.shape)}.")
    image, noise = _float32(image), _float32(noise)
    sigma = _per_sample(sigma, image)
    noised = image + _like(image, sigma) * noise
    if self_conditioned is not None:
        model_kwargs["self_cond"] = earlier_estimate(
            model, noised, sigma, self_conditioned, sigma_data, **model_kwargs
        )
    target = (image - _like(image, c_skip(sigma, sigma_data)) * noised) / _like(image, c_out(sigma, sigma_data))
    output = precondition(model, noised, sigma, sigma_data, model_kwargs)
    return (output - target).square().flatten(1).mean(1) * WEIGHTINGS[weighting](sigma, sigma_data)


# ----------------------------------------------------------------------------------------------------------------------
# Noise levels: u uniform in (0, 1) -> sigma


def stratified_uniform(
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    micro_step: int = 0,
    micro_steps: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """
    One draw from each of the `batch * world_size * micro_steps` equal strata of (0, 1): this process's and this
    micro-step's share, `(batch,)` float64. Over the whole global batch every stratum is hit once, which takes most of
    the variance out of the loss (Kingma et al. 2021, arXiv 2107.00630).

    Args:
        generator: one for all, or a list with one for each sample.

    Raises:
        ValueError: for a rank or micro-step outside its range, or another number of generators than samples.
    """
    if not (0 <= rank < world_size and 0 <= micro_step < micro_steps and batch > 0):
        raise ValueError(
            f"need batch > 0, 0 <= rank < world_size and 0 <= micro_step < micro_steps; got batch={batch}, rank={rank}, "
            f"world_size={world_size}, micro_step={micro_step}, micro_steps={micro_steps}."
        )
    groups = world_size * micro_steps
    strata = torch.arange(batch, dtype=torch.float64) * groups + micro_step * world_size + rank
    if generator is None or isinstance(generator, torch.Generator):
        u = torch.rand(batch, dtype=torch.float64, generator=generator)
    elif len(generator) == batch:
        u = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generator])
    else:
        raise ValueError(f"{len(generator)} generators were given for {batch} samples; give one for each, or one.")
    # rand is in [0, 1): keep sigma(0) and sigma(1), where some densities are infinite, out.
    return ((strata + u) / (batch * groups)).clamp(1e-12, 1 - 1e-12)


def _cosine_logsnr(t: Tensor, logsnr_first: float, logsnr_last: float) -> Tensor:
    """The log signal-to-noise ratio of a cosine schedule that runs from logsnr_first at t=0 to logsnr_last at t=1."""
    first, last = math.atan(math.exp(-logsnr_first / 2)), math.atan(math.exp(-logsnr_last / 2))
    return -2 * torch.log(torch.tan(first + t * (last - first)))


def _cosine_interpolated(
    u, image_size, sigma_data, noise_size_low=32, noise_size_high=None, sigma_min=1e-3, sigma_max=1e3
):
    """Hoogeboom et al. 2023, "simple diffusion", arXiv 2301.11093: the interpolated, shifted cosine schedule."""
    logsnr_first, logsnr_last = (-2 * math.log(sigma / sigma_data) for sigma in (sigma_max, sigma_min))

    def shifted(noise_size: float) -> Tensor:
        shift = 2 * math.log(noise_size / image_size)
        return _cosine_logsnr(u, logsnr_first - shift, logsnr_last - shift) + shift

    logsnr = torch.lerp(shifted(noise_size_low), shifted(noise_size_high or image_size), u)
    return sigma_data * torch.exp(-logsnr / 2)


def _cosine(u, image_size, sigma_data, sigma_min=1e-3, sigma_max=1e3):
    """Salimans & Ho 2022, arXiv 2202.00512 (v-diffusion), cut off at sigma_min and sigma_max."""
    low, high = math.atan(sigma_min / sigma_data), math.atan(sigma_max / sigma_data)
    return sigma_data * torch.tan(low + u * (high - low))


def _lognormal(u, image_size, sigma_data, mean=-1.2, std=1.2):
    """Section 5, "noise distribution during training"; the outermost 1e-7 are cut off, as the reference does."""
    # The reference rounds mean and std to float32. It moves sigma by 2e-7, but a replayed run draws the same levels.
    mean, std = torch.tensor([mean, std], dtype=torch.float32).double()
    return torch.exp(mean + std * torch.special.ndtri(u * (1 - 2e-7) + 1e-7))


def _loguniform(u, image_size, sigma_data, sigma_min=0.01, sigma_max=160.0):
    return torch.exp(math.log(sigma_min) + u * (math.log(sigma_max) - math.log(sigma_min)))


def _loglogistic(u, image_size, sigma_data, loc=None, scale=0.5, sigma_min=0.0, sigma_max=math.inf):
    """Logistic in ln σ around `loc` (ln σd if not given), cut off at sigma_min and sigma_max."""
    loc = math.log(sigma_data) if loc is None else loc
    low, high = (
        torch.sigmoid((torch.tensor(x, dtype=torch.float64).log() - loc) / scale) for x in (sigma_min, sigma_max)
    )
    return torch.exp(loc + scale * torch.logit(low + u * (high - low)))


DENSITIES = {
    "cosine-interpolated": _cosine_interpolated,
    "cosine": _cosine,
    "lognormal": _lognormal,
    "loguniform": _loguniform,
    "loglogistic": _loglogistic,
}


def sigma_from_uniform(
    u: Tensor, density: str = "cosine-interpolated", image_size: int = 256, sigma_data: float = 0.5, **params
) -> Tensor:
    """
    Noise levels by inverting the distribution function of a density at u; computed in float64, returned in u's dtype.

    Args:
        u: uniform draws in (0, 1), any shape.
        density: "cosine-interpolated" (the paper's; noise_size_low, noise_size_high, sigma_min, sigma_max), "cosine"
            (sigma_min, sigma_max), "lognormal" (mean, std), "loguniform" (sigma_min, sigma_max) or "loglogistic"
            (loc, scale, sigma_min, sigma_max).
        image_size: longer side of the image in pixels.
        **params: the density's parameters named above.

    Raises:
        ValueError: for an unknown density or parameter.
    """
    if density not in DENSITIES:
        raise ValueError(f"density must be one of {', '.join(map(repr, DENSITIES))}; got {density!r}.")
    function = DENSITIES[density]
    known = function.__code__.co_varnames[3 : function.__code__.co_argcount]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ValueError(f"the {density} density takes {', '.join(known)}; got {', '.join(unknown)}.")
    return function(u.double(), image_size, sigma_data, **params).to(u.dtype)


# ----------------------------------------------------------------------------------------------------------------------


def _float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_sample(sigma: Tensor | float, image: Tensor) -> Tensor:
    """`(B,)`, in the image's dtype and on its device."""
    return torch.as_tensor(sigma, dtype=image.dtype, device=image.device).expand(image.shape[0])


def _like(image: Tensor, x: Tensor) -> Tensor:
    """`(B,) -> (B, 1, 1, 1)`."""
    return x.reshape(-1, *(1,) * (image.ndim - 1))
