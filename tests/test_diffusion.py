"""The training mathematics against formulas written out in float64."""

import math

import pytest
import torch

from diffusers_hdit import diffusion


def exact_model(sample, timestep, return_dict=False, **conditions):
    """Any function will do where only the arithmetic around the network is of interest."""
    return (torch.tanh(sample) * (1 + timestep[:, None, None, None]),)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 5, 3, 8, 8, generator=generator, dtype=torch.float64).unbind(0)
    return image.clamp(-1, 1), noise, torch.tensor([0.01, 0.3, 0.5, 4.0, 80.0], dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_denoise(batch, sigma_data):
    image, noise, sigma = batch
    for i, s in enumerate(sigma.tolist()):
        noised = image[i] + s * noise[i]
        total = s**2 + sigma_data**2
        f = torch.tanh(noised / math.sqrt(total)) * (1 + math.log(s) / 4)
        expected = sigma_data**2 / total * noised + s * sigma_data / math.sqrt(total) * f
        result = diffusion.denoise(exact_model, noised[None], s, sigma_data)[0]
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


WEIGHT_ON_THE_DENOISED_IMAGE = {
    "soft-min-snr": lambda s, d: 1 / (s**2 + d**2),
    "min-snr": lambda s, d: min(1 / s**2, 1 / d**2),
    "snr": lambda s, d: 1 / s**2,
    "karras": lambda s, d: (s**2 + d**2) / (s * d) ** 2,
}


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("weighting", diffusion.WEIGHTINGS)
def test_loss_is_the_weighted_error_of_the_denoised_image(batch, weighting, sigma_data):
    image, noise, sigma = batch
    loss = diffusion.loss(exact_model, image, noise, sigma, sigma_data, weighting)
    denoised = diffusion.denoise(exact_model, image + sigma[:, None, None, None] * noise, sigma, sigma_data)
    error = (denoised - image).square().mean((1, 2, 3))
    weight = torch.tensor([WEIGHT_ON_THE_DENOISED_IMAGE[weighting](s, sigma_data) for s in sigma.tolist()])
    torch.testing.assert_close(loss, error * weight.double(), rtol=1e-6, atol=0)


def test_float32_whatever_the_model_computes_in(batch):
    image, noise, sigma = (x.bfloat16() for x in batch)
    half = lambda *args, **kwargs: (exact_model(*args, **kwargs)[0].bfloat16(),)  # noqa: E731
    assert diffusion.loss(half, image, noise, sigma).dtype == torch.float32
    assert diffusion.denoise(half, image, sigma).dtype == torch.float32


def test_conditions_reach_the_model(batch):
    seen = {}

    def model(sample, timestep, return_dict, **conditions):
        seen.update(conditions)
        return (sample,)

    image, noise, sigma = batch
    diffusion.loss(model, image, noise, sigma, class_labels=1, augment_cond=2)
    assert seen == {"class_labels": 1, "augment_cond": 2}


def test_stratified_over_the_global_batch():
    """Each of the 24 strata is hit once, however processes and micro-steps share them."""
    for world_size, micro_steps in ((1, 1), (3, 1), (1, 2), (2, 3)):
        batch = 24 // (world_size * micro_steps)
        u = torch.cat(
            [
                diffusion.stratified_uniform(batch, rank, world_size, micro_step, micro_steps)
                for rank in range(world_size)
                for micro_step in range(micro_steps)
            ]
        )
        assert sorted((u * 24).long().tolist()) == list(range(24))
        assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(*(diffusion.stratified_uniform(4, generator=g) for g in generators))
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        diffusion.stratified_uniform(4, rank=2, world_size=2)


@pytest.mark.parametrize("density", diffusion.DENSITIES)
def test_densities_are_monotonic_and_keep_the_dtype(density):
    u = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=torch.float64)
    sigma = diffusion.sigma_from_uniform(u, density, image_size=128)
    assert sigma.isfinite().all() and (sigma > 0).all()
    assert (sigma.diff() > 0).all() or (sigma.diff() < 0).all()
    assert diffusion.sigma_from_uniform(u.float(), density).dtype == torch.float32


def test_density_ranges_and_quantiles():
    u = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    low, middle, high = diffusion.sigma_from_uniform(u, "loguniform", sigma_min=0.1, sigma_max=10.0).tolist()
    assert (low, middle, high) == pytest.approx((0.1, 1.0, 10.0))
    assert diffusion.sigma_from_uniform(u, "lognormal", mean=0.3, std=2.0)[1].item() == pytest.approx(math.exp(0.3))
    assert diffusion.sigma_from_uniform(u, "loglogistic", loc=0.3)[1].item() == pytest.approx(math.exp(0.3))
    ends = diffusion.sigma_from_uniform(u, "cosine-interpolated", sigma_min=0.01, sigma_max=100.0)
    assert sorted(ends[[0, 2]].tolist()) == pytest.approx([0.01, 100.0], rel=1e-3)


def test_errors(batch):
    image, noise, sigma = batch
    with pytest.raises(ValueError, match="weighting must be one of 'soft-min-snr'.*got 'l2'"):
        diffusion.loss(exact_model, image, noise, sigma, weighting="l2")
    with pytest.raises(ValueError, match="image and noise must have one shape"):
        diffusion.loss(exact_model, image, noise[:1], sigma)
    with pytest.raises(ValueError, match="density must be one of 'cosine-interpolated'.*got 'uniform'"):
        diffusion.sigma_from_uniform(torch.rand(3), "uniform")
    with pytest.raises(ValueError, match="the lognormal density takes mean, std; got loc"):
        diffusion.sigma_from_uniform(torch.rand(3), "lognormal", loc=1.0)
