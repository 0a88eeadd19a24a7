"""The samplers against k-diffusion's formulas in float64, and as components of pipelines."""

import json
import math
import re

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_hdit import DPMSolverPP3MSDEScheduler, EDMHeunScheduler, HDiTModel, HDiTPipeline


SIGMAS = {"sigma_min": 0.01, "sigma_max": 80.0, "sigma_data": 0.5}
BOTH = [DPMSolverPP3MSDEScheduler, EDMHeunScheduler]


def exact(x, sigma):
    """The denoised image of a mixture of two Gaussians, far from linear in x."""
    variance = 0.04 + sigma**2
    weight = torch.sigmoid(x * 1.2 / variance)
    mean = 0.6 * (2 * weight - 1)
    return mean + 0.04 / variance * (x - mean)


def network(x, sigma, sigma_data=0.5):
    """F whose denoised image is `exact`."""
    total = sigma**2 + sigma_data**2
    return (exact(x, sigma) - sigma_data**2 / total * x) * math.sqrt(total) / (sigma * sigma_data)


def run(scheduler, x, noises=None, **kwargs):
    noises = iter(noises if noises is not None else [])
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        sigma = scheduler.sigmas[i].item()
        assert math.exp(4 * t) == pytest.approx(sigma, rel=1e-5)
        torch.testing.assert_close(scaled, x / math.sqrt(sigma**2 + 0.25))
        noise = {"noise": next(noises, None)} if isinstance(scheduler, DPMSolverPP3MSDEScheduler) else {}
        x = scheduler.step(network(x, sigma), t, x, **noise, **kwargs, return_dict=False)[0]
    return x


def reference_3m_sde(x, sigmas, noises, eta):
    """The update as in the paper's sampler, written over lambda = -ln(sigma)."""
    lambdas, history = [-math.log(s) if s else math.inf for s in sigmas], []
    for i, sigma in enumerate(sigmas[:-1]):
        d = exact(x, sigma)
        if sigmas[i + 1] == 0:
            return d
        h = lambdas[i + 1] - lambdas[i]
        g = h * (1 + eta)
        x = math.exp(-g) * x + (1 - math.exp(-g)) * d
        if len(history) >= 1:
            r0 = (lambdas[i] - lambdas[i - 1]) / h
            slope0 = (d - history[-1]) / r0
            d1, d2 = slope0, 0.0
            if len(history) >= 2:
                r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
                slope1 = (history[-1] - history[-2]) / r1
                d1 = slope0 + (slope0 - slope1) * r0 / (r0 + r1)
                d2 = (slope0 - slope1) / (r0 + r1)
            phi2 = (math.exp(-g) - 1) / g + 1
            x = x + phi2 * d1 - (phi2 / g - 0.5) * d2
        x = x + sigmas[i + 1] * math.sqrt(1 - math.exp(-2 * h * eta)) * noises[i]
        history.append(d)


def start(batch=4):
    generator = torch.Generator().manual_seed(0)
    x, *noises = torch.randn(21, batch, 1, 4, 4, generator=generator, dtype=torch.float64).unbind(0)
    return SIGMAS["sigma_max"] * x, noises


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_3m_sde_against_the_reference(steps, eta):
    scheduler = DPMSolverPP3MSDEScheduler(**SIGMAS, eta=eta)
    scheduler.set_timesteps(steps)
    x, noises = start()
    found = run(scheduler, x, noises)
    expected = reference_3m_sde(x, scheduler.sigmas.double().tolist(), noises, eta)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def reference_heun(x, sigmas):
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - exact(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        if following == 0:
            return euler
        x = x + (following - sigma) * (slope + (euler - exact(euler, following)) / following) / 2


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_heun_against_the_reference(steps):
    scheduler = EDMHeunScheduler(**SIGMAS)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == 2 * steps - 1 == len(scheduler.sigmas) - 1
    euler = EDMEulerScheduler(**SIGMAS)
    euler.set_timesteps(steps)
    x, _ = start()
    expected = reference_heun(x, euler.sigmas.double().tolist())
    torch.testing.assert_close(run(scheduler, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scheduler", [EDMHeunScheduler, lambda **s: DPMSolverPP3MSDEScheduler(**s, eta=0.0)])
def test_halving_the_step_quarters_the_error(scheduler):
    """Also for the third-order solver, whose first steps are of lower order. The step to sigma 0 does not become smaller
    with more steps, so it is left out."""
    scheduler, (x, _) = scheduler(sigma_min=1.0, sigma_max=2.0), start()
    results = []
    for steps in (17, 33, 65, 2049):
        scheduler.set_timesteps(steps)
        y = x / 40
        for i, t in enumerate(scheduler.timesteps[:-1]):
            y = scheduler.step(network(y, scheduler.sigmas[i].item()), t, y, return_dict=False)[0]
        results.append(y)
    errors = [(y - results[-1]).norm().item() for y in results[:-1]]
    assert errors[0] / errors[1] > 3.7 and errors[1] / errors[2] > 3.7


def test_a_batch_split_in_any_way():
    x, _ = start()

    def draw(parts):
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        out = []
        for part in parts:
            scheduler = DPMSolverPP3MSDEScheduler(**SIGMAS)
            scheduler.set_timesteps(8)
            out.append(run(scheduler, x[part], generator=generators[part]))
        return torch.cat(out)

    whole = draw([slice(0, 4)])
    assert torch.equal(whole, draw([slice(0, 4)])), "reproducible"
    for parts in ([slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]):
        torch.testing.assert_close(draw(parts), whole, rtol=1e-12, atol=1e-12)
    with_noise = run_once(seed=1)
    assert not torch.equal(with_noise, run_once(seed=2)) and torch.equal(with_noise, run_once(seed=1))


def run_once(seed):
    scheduler = DPMSolverPP3MSDEScheduler(**SIGMAS)
    scheduler.set_timesteps(6)
    return run(scheduler, start()[0], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", BOTH)
def test_used_twice_and_begun_in_the_middle(cls):
    scheduler, (x, noises) = cls(**SIGMAS), start()
    scheduler.set_timesteps(8)
    first = run(scheduler, x, noises)
    scheduler.set_timesteps(8)
    assert torch.equal(run(scheduler, x, noises), first), "nothing is left of the first use"
    begin = 4
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(begin)
    y = scheduler.sigmas[begin] * x / 80
    sigmas = scheduler.sigmas[begin:].double().tolist()
    if cls is EDMHeunScheduler:
        expected = reference_heun(y, [*sigmas[0:1], *sigmas[1:-1][1::2], sigmas[-1]])
    else:
        expected = reference_3m_sde(y, sigmas, noises, eta=1.0)
    rest = iter(noises)
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        noise = {} if cls is EDMHeunScheduler else {"noise": next(rest)}
        y = scheduler.step(network(y, scheduler.sigmas[i].item()), t, y, **noise, return_dict=False)[0]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", BOTH)
def test_swapped_in_and_out(cls, caplog):
    theirs = EDMDPMSolverMultistepScheduler(**{**SIGMAS, "sigma_data": 1.0}, rho=5.0, solver_type="heun")
    ours = cls.from_config(theirs.config)
    assert isinstance(ours, SchedulerMixin) and isinstance(ours, ConfigMixin)
    assert (ours.config.sigma_max, ours.config.sigma_data, ours.config.rho) == (80.0, 1.0, 5.0)
    assert ours.init_noise_sigma == 80.0
    back = EDMDPMSolverMultistepScheduler.from_config(ours.config)
    assert (back.config.sigma_max, back.config.sigma_data, back.config.rho) == (80.0, 1.0, 5.0)
    theirs.set_timesteps(9)
    ours.set_timesteps(9)
    torch.testing.assert_close(ours.sigmas.unique(), theirs.sigmas.unique(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cls", BOTH)
def test_values_survive_a_swap_whoever_gave_them(cls):
    for other in (EDMDPMSolverMultistepScheduler, EDMEulerScheduler):
        assert cls.from_config(other().config).config.sigma_max == other().config.sigma_max
        assert other.from_config(cls(sigma_max=50.0).config).config.sigma_max == 50.0
        assert other.from_config(cls(0.1, 50.0).config).config.sigma_max == 50.0


@pytest.mark.parametrize("cls", BOTH)
def test_half_precision_is_computed_in_single(cls):
    eta = {} if cls is EDMHeunScheduler else {"eta": 0.0}
    scheduler, (x, _) = cls(**SIGMAS, **eta), start()
    scheduler.set_timesteps(3)
    t = scheduler.timesteps[0]
    expected = scheduler.step(network(x, 80.0).half().double(), t, x.half().double()).prev_sample
    scheduler.set_timesteps(3)
    found = scheduler.step(network(x, 80.0).half(), t, x.half()).prev_sample
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", BOTH)
def test_errors(cls):
    with pytest.raises(ValueError, match="final_sigmas_type must be 'zero', got 'sigma_min'"):
        cls(final_sigmas_type="sigma_min")
    with pytest.raises(ValueError, match="call set_timesteps first"):
        cls().step(torch.zeros(1), torch.zeros(()), torch.zeros(1))
    with pytest.raises(ValueError, match="eta must not be negative, got -1"):
        DPMSolverPP3MSDEScheduler(eta=-1)


@pytest.mark.parametrize("cls", BOTH)
def test_saved_by_itself_and_in_a_pipeline(cls, make_model, tmp_path, caplog):
    scheduler = cls(**SIGMAS)
    scheduler.save_pretrained(tmp_path / "alone")
    assert cls.from_pretrained(tmp_path / "alone").config.sigma_max == 80.0
    pipe = HDiTPipeline(make_model(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["scheduling_edm", cls.__name__]
    assert (tmp_path / "pipe" / "scheduler" / "scheduling_edm.py").is_file()
    loaded = HDiTPipeline.from_pretrained(tmp_path / "pipe")
    assert type(loaded.scheduler) is cls
    loaded.set_progress_bar_config(disable=True)
    draw = lambda p: p(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent").images  # noqa: E731
    assert torch.equal(draw(loaded), draw(pipe))
    assert not re.search("expected|ignored", caplog.text)


def test_the_pipeline_of_a_3m_sde_model_is_reproducible(make_model):
    pipe = HDiTPipeline(make_model(num_classes=3), DPMSolverPP3MSDEScheduler(**SIGMAS))
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.transformer, HDiTModel)

    def draw(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(labels, num_inference_steps=5, generator=generators, output_type="latent").images

    together = draw([0, 1, 2], [5, 6, 7])
    apart = torch.cat((draw([0], [5]), draw([1, 2], [6, 7])))
    # A sampler that confused the generators would be off by 1; matrices of other heights round otherwise.
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [DPMSolverPP3MSDEScheduler, EDMHeunScheduler])
def test_custom_sigmas_are_used_as_they_are(cls):
    for sigmas in ([5.0, 1.0, 0.1], torch.tensor([5.0, 1.0, 0.1]), [5.0, 1.0, 0.1, 0.0]):
        scheduler = cls()
        scheduler.set_timesteps(sigmas=sigmas)
        assert sorted(set(scheduler.sigmas.tolist()), reverse=True) == pytest.approx([5.0, 1.0, 0.1, 0.0])
        assert scheduler.timesteps[0].item() == pytest.approx(math.log(5.0) / 4)
        sample = torch.randn(1, 3, 4, 4) * 5
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.zeros_like(sample), t, sample).prev_sample
        assert scheduler.num_inference_steps == 3 and sample.isfinite().all()
    for wrong in ([1.0, 2.0], [1.0, -1.0], [], [float("nan")]):
        with pytest.raises(ValueError, match="positive, finite and decreasing"):
            cls().set_timesteps(sigmas=wrong)
    with pytest.raises(ValueError, match="either num_inference_steps or sigmas"):
        cls().set_timesteps()


@pytest.mark.parametrize(
    "cls", [DPMSolverPP3MSDEScheduler, EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler]
)
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_one_step_begins_at_sigma_max(cls, schedule, make_model):
    """Diffusers' exponential schedule would begin at sigma_min, where there is next to no noise to remove."""
    scheduler = cls(sigma_max=50.0, sigma_schedule=schedule)
    pipe = HDiTPipeline(make_model(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=1)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([50.0, 0.0])
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([math.log(50.0) / 4])
