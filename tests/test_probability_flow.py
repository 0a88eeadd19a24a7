"""The ODE on a Gaussian, whose trajectories and likelihood are known, and on a network."""

import math

import pytest
import torch
from conftest import relative_error
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig

from diffusers_hdit import HDiTPipeline, probability_flow


MEAN, LOW, HIGH = 0.3, 0.01, 80.0


@pytest.fixture
def gaussian():
    """Independent values of mean 0.3 and known standard deviations, and the exact denoiser."""
    generator = torch.Generator().manual_seed(0)
    std = 0.2 + torch.rand(3, 4, 4, generator=generator, dtype=torch.float64)
    image = MEAN + std * torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    return std, image, lambda x, sigma: MEAN + std**2 / (std**2 + sigma**2) * (x - MEAN)


def test_trajectory_of_a_gaussian(gaussian):
    """x - mean grows with sqrt(std² + sigma²)."""
    std, image, denoiser = gaussian
    noise = probability_flow.image_to_noise(denoiser, image, LOW, HIGH, steps=100)
    expected = MEAN + (image - MEAN) * ((std**2 + HIGH**2) / (std**2 + LOW**2)).sqrt()
    torch.testing.assert_close(noise * HIGH, expected, rtol=1e-5, atol=1e-5)
    back = probability_flow.noise_to_image(denoiser, noise, LOW, HIGH, steps=100)
    torch.testing.assert_close(back, image, rtol=1e-6, atol=1e-6)


def test_fourth_order(gaussian):
    _, image, denoiser = gaussian
    exact = probability_flow.image_to_noise(denoiser, image, LOW, HIGH, steps=800)
    errors = [
        relative_error(probability_flow.image_to_noise(denoiser, image, LOW, HIGH, steps=n), exact) for n in (25, 50)
    ]
    assert errors[0] / errors[1] > 2**3.5


def test_likelihood_of_a_gaussian(gaussian):
    """With a diagonal Jacobian random signs are exact."""
    std, image, denoiser = gaussian
    # From far up, where the noise drowns the mean and the variance of the data.
    high = 3000.0
    found = probability_flow.log_likelihood(denoiser, image, LOW, high, steps=300)
    variance = std**2 + LOW**2
    expected = -0.5 * ((image - MEAN) ** 2 / variance + (2 * math.pi * variance).log()).sum((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    # At any height exactly the density that the ODE gives to the noise it is drawn from.
    found = probability_flow.log_likelihood(denoiser, image, LOW, HIGH, steps=300)
    end = MEAN + (image - MEAN) * ((std**2 + HIGH**2) / variance).sqrt()
    prior = -0.5 * ((end / HIGH) ** 2 + math.log(2 * math.pi * HIGH**2))
    expected = (prior + 0.5 * ((std**2 + HIGH**2) / variance).log()).sum((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_hutchinson_on_correlated_values():
    """A full covariance: the estimate is unbiased, and more probes bring it closer."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64) / 3
    covariance = root @ root.T + 0.1 * torch.eye(12, dtype=torch.float64)
    image = torch.distributions.MultivariateNormal(torch.zeros(12, dtype=torch.float64), covariance)
    expected_at = image.__class__(
        torch.zeros(12, dtype=torch.float64), covariance + LOW**2 * torch.eye(12, dtype=torch.float64)
    )
    torch.manual_seed(0)
    x = image.sample((2,))

    def denoiser(x, sigma):
        shrink = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(12, dtype=torch.float64))
        return (x.flatten(1) @ shrink.T).view_as(x)

    expected = expected_at.log_prob(x)
    x = x.view(2, 3, 2, 2)
    errors = []
    for probes in (1, 200):
        seed = torch.Generator().manual_seed(1)
        found = probability_flow.log_likelihood(denoiser, x, LOW, 300.0, 100, probes, generator=seed)
        errors.append((found - expected).abs().max().item())
    assert errors[1] < 0.6 and errors[1] < errors[0]


def test_bits_per_dimension():
    """A uniform density over [-1, 1] and 256 grey levels 1/127.5 apart: log2(255) bits."""
    log_p = torch.tensor([-3 * 4 * math.log(2.0)])
    assert probability_flow.bits_per_dimension(log_p, (3, 2, 2)).item() == pytest.approx(math.log2(255))


@pytest.fixture
def pipeline(make_model):
    model = make_model(num_classes=3)
    return HDiTPipeline(model, EDMDPMSolverMultistepScheduler(sigma_min=0.02, sigma_max=80.0))


def test_round_trip_through_a_network(pipeline):
    """With random weights, which are far rougher than trained ones; docs/sampling.md has the error of a trained one."""
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    denoiser = probability_flow.denoiser_of(pipeline, [0, 2])
    errors = []
    for steps in (20, 80):
        noise = probability_flow.image_to_noise(denoiser, image, 0.02, 80.0, steps)
        errors.append(relative_error(probability_flow.noise_to_image(denoiser, noise, 0.02, 80.0, steps), image))
    assert errors[1] < 2e-3 and errors[1] < errors[0] / 4
    # The pipeline's own solvers start from the same noise.
    drawn = pipeline([0, 2], latents=noise, num_inference_steps=200, output_type="latent").images
    assert relative_error(drawn, image) < 0.1


def test_likelihood_of_a_network_against_its_jacobian(pipeline):
    """The estimate's mean over all sign vectors of few values is the trace."""
    pipeline.transformer.double()
    denoiser = probability_flow.denoiser_of(pipeline, 1)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    eps = 1e-5
    found = probability_flow.log_likelihood(
        denoiser, x, 1.0, 1.00001, 1, generator=torch.Generator().manual_seed(3)
    ) - probability_flow.log_likelihood(lambda x, sigma: x, x, 1.0, 1.00001, 1)
    with torch.no_grad():
        velocity = [y - denoiser(y, 1.000005) for y in (x + eps * v, x - eps * v)]
        moved = 1.00001 * probability_flow.image_to_noise(denoiser, x, 1.0, 1.00001, 1)
    divergence = ((velocity[0] - velocity[1]) / (2 * eps) * v).sum() * math.log(1.00001)
    prior = -0.5 * (moved**2 - x**2).sum() / 1.00001**2
    torch.testing.assert_close(found[0], prior + divergence, rtol=1e-3, atol=1e-6)


def test_slerp():
    a, b = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(probability_flow.slerp(a, b, 0.0), a)
    torch.testing.assert_close(probability_flow.slerp(a, b, 1.0), b)
    half = probability_flow.slerp(a, b, 0.5)
    # Halfway on the sphere: as far from both, and as long as they are.
    for i in range(4):
        x, y, z = (v[i].flatten().double() for v in (a, b, half))
        angle = torch.acos(x @ y / (x.norm() * y.norm()))
        expected = (torch.sin(angle / 2) / torch.sin(angle)) * (x + y)
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
    assert 0.9 < half.std() < 1.1
    torch.testing.assert_close(probability_flow.slerp(a, a, 0.3), a)
    each = probability_flow.slerp(a, b, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(each, torch.stack((a[0], b[1], a[2], b[3])))
    with pytest.raises(ValueError, match="one shape"):
        probability_flow.slerp(a, b[:1], 0.5)


def test_errors(pipeline):
    x = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        probability_flow.image_to_noise(lambda x, s: x, x, 1.0, 0.5)
    with pytest.raises(ValueError, match="probes must be at least 1"):
        probability_flow.log_likelihood(lambda x, s: x, x, 0.1, 0.5, probes=0)
    with pytest.raises(ValueError, match="conditions for 3 images, but got 2"):
        probability_flow.denoiser_of(pipeline, [0, 1, 2])(x, 1.0)


def test_a_cache_is_refused(make_model):
    model = make_model(depths=(1, 1, 2))
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"call pipe.transformer.disable_cache\(\) first"):
        probability_flow.denoiser_of(HDiTPipeline(model, EDMDPMSolverMultistepScheduler()))
