"""Self-conditioning (Chen et al. 2022): in the network, in the loss, in every pipeline, and in the training script."""

import math
import shutil

import pytest
import torch
from conftest import relative_error
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from running import CONFIG, TRAIN, equal, launch, losses, run, weights, write_config

from diffusers_hdit import (
    DPMSolverPP3MSDEScheduler,
    EDMHeunScheduler,
    HDiTImg2ImgPipeline,
    HDiTInpaintPipeline,
    HDiTModel,
    HDiTPipeline,
    HDiTUpscalePipeline,
    diffusion,
    probability_flow,
)
from diffusers_hdit.training import objective
from diffusers_hdit.training.config import parse_args


SIGMAS = {"sigma_min": 0.01, "sigma_max": 80.0, "sigma_data": 0.5}
SCHEDULERS = [
    EDMEulerScheduler(**SIGMAS),
    EDMDPMSolverMultistepScheduler(**SIGMAS),
    EDMDPMSolverMultistepScheduler(**SIGMAS, algorithm_type="sde-dpmsolver++", solver_type="heun"),
    DPMSolverPP3MSDEScheduler(**SIGMAS),
    EDMHeunScheduler(**SIGMAS),
]
NAMES = [f"{type(scheduler).__name__}-{scheduler.config.get('algorithm_type')}" for scheduler in SCHEDULERS]


@pytest.fixture
def make_pipeline(make_model):
    def make(cls=HDiTPipeline, scheduler=SCHEDULERS[0], guidance_model=None, **overrides):
        config = {"num_classes": 3, "self_conditioning": True, **overrides}
        pipeline = cls(make_model(**config), scheduler, guidance_model=guidance_model)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def calls(monkeypatch):
    """What every evaluation got, and its F, in float64."""
    recorded = []
    forward = HDiTModel.forward

    def recording(self, sample, timestep, **kwargs):
        output = forward(self, sample, timestep, **kwargs)
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        recorded.append({"model": self, "sample": sample, "timestep": timestep, "F": output[0], **tensors})
        return output

    monkeypatch.setattr(HDiTModel, "forward", recording)
    return recorded


def image(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def denoised(model, x, sigma, labels, estimate):
    """D by hand (Karras et al. 2022, table 1)."""
    norm = math.sqrt(sigma**2 + 0.25)
    with torch.no_grad():
        output = model(x / norm, math.log(sigma) / 4, class_labels=labels, self_cond=estimate).sample
    return 0.25 / norm**2 * x + 0.5 * sigma / norm * output


# ----------------------------------------------------------------------------------------------------------------------
# The network


def test_the_estimate_is_more_channels_of_the_patches(make_model):
    """In the order sample, conditioning image, estimate, unscaled: the first projection by hand, and zeros are none."""
    model = make_model(self_conditioning=True, conditioning_channels=4).double()
    sample, small, estimate = (image(i, 2, c, 32, 32, dtype=torch.float64) for i, c in enumerate((3, 4, 3)))
    found = []
    model.patch_in.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        first = model(sample, 0.3, conditioning_image=small, self_cond=estimate).sample
        none, zeros = (model(sample, 0.3, conditioning_image=small, self_cond=x).sample for x in (None, 0 * estimate))
    weight = model.patch_in.proj.weight.view(32, 2, 2, 10)
    images = torch.cat((sample, small, estimate), dim=1).view(2, 10, 16, 2, 16, 2)
    torch.testing.assert_close(found[0], torch.einsum("dpqc,bchpwq->bhwd", weight, images))
    assert torch.equal(none, zeros) and relative_error(first, none) > 1e-3


def test_gradients_reach_the_estimates_weights(make_model):
    model = make_model(self_conditioning=True)
    estimate = image(1, 2, 3, 32, 32).requires_grad_()
    model(image(0, 2, 3, 32, 32), 0.3, self_cond=estimate).sample.square().mean().backward()
    gradient = model.patch_in.proj.weight.grad.view(32, 2, 2, 6)
    assert estimate.grad.norm() > 0 and (gradient.square().sum((0, 1, 2)) > 0).all()


def test_errors(make_model):
    sample = image(0, 2, 3, 32, 32)
    with pytest.raises(
        ValueError, match="self_conditioning=False: it takes no earlier estimate. Leave it out, or train"
    ):
        make_model()(sample, 0.0, self_cond=sample)
    with pytest.raises(ValueError, match=r"shape of the sample, \(2, 3, 32, 32\), got \(1, 3, 32, 32\)"):
        make_model(self_conditioning=True)(sample, 0.0, self_cond=sample[:1])


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def loss_inputs(dtype):
    sigma = torch.tensor([0.02, 0.4, 3.0, 30.0], dtype=dtype)
    shown = torch.tensor([True, False, True, False])
    return image(0, 4, 3, 32, 32, dtype=dtype).clamp(-1, 1), image(1, 4, 3, 32, 32, dtype=dtype), sigma, shown


def test_loss_and_gradients_by_hand(make_model):
    """Algorithm 1 image by image in float64; the estimate is a constant to the gradient."""
    model = make_model(self_conditioning=True, num_classes=3).double()
    images, noise, sigma, shown = loss_inputs(torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    found = diffusion.loss(model, images, noise, sigma, self_conditioned=shown, class_labels=labels)
    gradients = torch.autograd.grad(found.sum(), model.parameters())
    expected = []
    for i, s in enumerate(sigma.tolist()):
        x, label = (images + s * noise)[i : i + 1], labels[i : i + 1]
        estimate = torch.zeros_like(x)
        if shown[i]:
            estimate = denoised(model, x, s, label, estimate)
        norm = math.sqrt(s**2 + 0.25)
        output = model(x / norm, math.log(s) / 4, class_labels=label, self_cond=estimate).sample
        error = 0.25 / norm**2 * x + 0.5 * s / norm * output - images[i]
        expected.append(error.square().mean() / (s**2 + 0.25))
    expected = torch.stack(expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for gradient, target in zip(gradients, torch.autograd.grad(expected.sum(), model.parameters()), strict=True):
        torch.testing.assert_close(gradient, target, rtol=1e-5, atol=1e-9)
    plain = diffusion.loss(model, images, noise, sigma, class_labels=labels)
    assert torch.equal(plain[~shown], found[~shown]) and (plain[shown] != found[shown]).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_autocast(make_model, checkpointing):
    """Those of one pass that is given the same estimate: the pass before it must leave no trace."""
    model = make_model(self_conditioning=True).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    images, noise, sigma, shown = loss_inputs(torch.float32)
    results = []
    for given in ("mask", "estimate"):
        kwargs = {"self_conditioned": shown}
        if given == "estimate":
            with torch.autocast("cpu", torch.bfloat16):
                noised = images + sigma.view(-1, 1, 1, 1) * noise
                kwargs = {"self_cond": diffusion.earlier_estimate(model, noised, sigma, shown)}
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = diffusion.loss(model, images, noise, sigma, **kwargs).mean()
        value.backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient is not None and gradient.norm() > 0, name
        assert torch.equal(gradient, results[1][name]), name


# ----------------------------------------------------------------------------------------------------------------------
# Draws of the training


class Recorder:
    """Stands where the network does. Its output is not zero, so that neither is its estimate."""

    def __init__(self):
        self.calls = []

    def __call__(self, sample, timestep, return_dict, **conditions):
        self.calls.append({"sample": sample, "timestep": timestep, **conditions})
        return (torch.tanh(sample),)


def losses_and_inputs(numbers, self_conditioning=True, strata=None, **flags):
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    args = parse_args(["--dataset_name", "x", "--output_dir", "y", *arguments])
    batch = {
        "image": torch.stack([image(n, 3, 16, 16).mul(50).add(128).clamp(0, 255).byte() for n in numbers]),
        "number": torch.tensor(list(numbers)),
        "label": torch.tensor([n % 13 for n in numbers]),
    }
    recorder = Recorder()
    settings = {"self_conditioning": True} if self_conditioning else {}
    values, sigmas = objective.sample_and_compute_loss(
        recorder, batch, torch.device("cpu"), args, num_classes=13, image_size=16, strata=strata or {}, **settings
    )
    return {"loss": values, "sigma": sigmas, **recorder.calls[-1]}, recorder.calls


def test_other_random_numbers_are_those_of_a_model_without():
    flags = {"augment_prob": 0.5, "task": "upscale", "upscale_factor": 2, "label_dropout": 0.5}
    plain, once = losses_and_inputs(range(8), self_conditioning=False, **flags)
    with_it, twice = losses_and_inputs(range(8), **flags)
    assert len(once) == 1 and len(twice) == 2 and "self_cond" not in once[0] and "self_cond" not in twice[0]
    for name in set(plain) - {"loss"}:
        assert torch.equal(plain[name], with_it[name]) and torch.equal(plain[name], {**plain, **twice[0]}[name]), name


def test_half_of_the_images_are_shown_their_estimate():
    found, _ = losses_and_inputs(range(2000))
    shown = found["self_cond"].flatten(1).any(1)
    assert shown.float().mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 2000))
    sigma = found["sigma"].view(-1, 1, 1, 1)
    norm = (sigma**2 + 0.25).sqrt()
    estimate = 0.25 / norm * found["sample"] + 0.5 * sigma / norm * torch.tanh(found["sample"])
    torch.testing.assert_close(found["self_cond"][shown], estimate[shown])
    assert abs(torch.corrcoef(torch.stack((shown.double(), found["sigma"].log().double())))[0, 1]) < 0.1


def test_random_numbers_follow_the_image_however_the_batch_is_divided():
    """Global batch of 8: image j of micro-step m on process r is number j * 4 + m * 2 + r."""
    whole, _ = losses_and_inputs(range(8), augment_prob=0.5)
    shown = whole["self_cond"].flatten(1).any(1)
    assert 0 < shown.sum() < 8
    for micro_step in range(2):
        for rank in range(2):
            places = [4 * j + 2 * micro_step + rank for j in range(2)]
            strata = {"rank": rank, "world_size": 2, "micro_step": micro_step, "micro_steps": 2}
            share, passes = losses_and_inputs(places, strata=strata, augment_prob=0.5)
            assert len(passes) == 2, "also where no image of this process is shown anything"
            for name in whole:
                torch.testing.assert_close(share[name], whole[name][places], rtol=0, atol=1e-6, msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def assert_handed_on(calls, begins=(0,)):
    """Every evaluation sees D of the one before, zeros where a stretch begins. c_in and c_noise give x and sigma back."""
    for i, call in enumerate(calls):
        expected = torch.zeros_like(call["self_cond"], dtype=torch.float64)
        if i not in begins:
            before = calls[i - 1]
            sigma = math.exp(4 * before["timestep"].double().item())
            norm = math.sqrt(sigma**2 + 0.25)
            expected = 0.25 / norm * before["sample"].double() + 0.5 * sigma / norm * before["F"].double()
            assert expected.norm() > 0.1
        torch.testing.assert_close(call["self_cond"].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_against_an_independent_loop_in_float64(make_pipeline, method, scale):
    """With guidance both halves see the guided estimate of the evaluation before."""
    pipe = make_pipeline(scheduler=SCHEDULERS[0] if method == "euler" else SCHEDULERS[-1])
    with torch.no_grad():  # random weights are so rough that rounding would grow a thousandfold from step to step
        pipe.transformer.patch_out.proj.weight.mul_(0.1)
    steps, noise, labels = 6, image(5, 2, 3, 32, 32), torch.tensor([0, 2])
    found = pipe([0, 2], latents=noise, num_inference_steps=steps, guidance_scale=scale, output_type="latent").images
    model = pipe.transformer.double()
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = [*((80 ** (1 / 7) + ramp * (0.01 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist(), 0.0]

    def sample(hands_on):
        x, estimate = sigmas[0] * noise.double(), torch.zeros(2, 3, 32, 32, dtype=torch.float64)

        def denoise(x, sigma):
            nonlocal estimate
            shown = estimate if hands_on else 0 * estimate
            weak, strong = (denoised(model, x, sigma, y, shown) for y in (torch.full_like(labels, 3), labels))
            estimate = weak + scale * (strong - weak)
            return estimate

        for sigma, below in zip(sigmas[:-1], sigmas[1:], strict=True):
            slope = (x - denoise(x, sigma)) / sigma
            euler = x + (below - sigma) * slope
            if method == "heun" and below:
                slope = (slope + (euler - denoise(euler, below)) / below) / 2
            x = x + (below - sigma) * slope
        return x

    # The pipeline's latents and the schedulers' noise levels are float32.
    assert relative_error(found, sample(hands_on=True)) < 3e-5
    assert relative_error(found, sample(hands_on=False)) > 1e-2


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=NAMES)
def test_every_scheduler(make_pipeline, calls, scheduler):
    pipe = make_pipeline(scheduler=scheduler)
    pipe([0, 1], num_inference_steps=5, generator=torch.Generator().manual_seed(0))
    assert len(calls) == (9 if scheduler.order == 2 else 5)
    assert_handed_on(calls)


@pytest.mark.parametrize("settings", [{"guidance_rescale": 0.7}, {"adaptive_projection": {"momentum": -0.5}}], ids=str)
def test_the_guided_estimate_is_passed_on(make_pipeline, calls, settings):
    """The last step ends at sigma 0, where the sampler returns what it took for the clean image."""
    pipe = make_pipeline()
    ends = []
    for steps in (1, 2):
        calls.clear()
        pipe([0, 2], latents=image(0, 2, 3, 32, 32), num_inference_steps=steps, guidance_scale=3.0, **settings)
        ends.append(calls[-1]["self_cond"])
    assert ends[0].norm() == 0
    weak, strong = ends[1].chunk(2)
    final = pipe(
        [0, 2],
        latents=image(0, 2, 3, 32, 32),
        num_inference_steps=1,
        guidance_scale=3.0,
        output_type="latent",
        **settings,
    ).images
    torch.testing.assert_close(weak, final, rtol=1e-4, atol=1e-4)
    assert torch.equal(weak, strong)


def test_guidance_models_with_and_without(make_pipeline, make_model, calls):
    for has_it in (True, False):
        guide = make_model(num_classes=3, self_conditioning=has_it, depths=(1, 1, 1))
        pipe = make_pipeline(guidance_model=guide)
        calls.clear()
        pipe(0, num_inference_steps=3, guidance_scale=2.0)
        of_guide, of_model = ([call for call in calls if call["model"] is m] for m in (guide, pipe.transformer))
        assert len(of_guide) == len(of_model) == 3 and of_model[1]["self_cond"].norm() > 0
        if has_it:
            assert all(torch.equal(a["self_cond"], b["self_cond"]) for a, b in zip(of_guide, of_model, strict=True))
        else:
            assert not any("self_cond" in call for call in of_guide)
    pipe = make_pipeline(guidance_model=make_model(num_classes=3, self_conditioning=True), self_conditioning=False)
    with pytest.raises(
        ValueError, match="self_conditioning=True, the transformer False; it must have the same or False"
    ):
        pipe(0, guidance_scale=2.0)


def test_image_to_image(make_pipeline, calls):
    pipe = make_pipeline(HDiTImg2ImgPipeline, SCHEDULERS[-1])
    pipe(torch.rand(3, 32, 32), 0, strength=0.5, num_inference_steps=6)
    assert len(calls) == 5
    assert_handed_on(calls)


def test_inpainting_begins_anew_after_a_jump(make_pipeline, calls):
    pipe = make_pipeline(HDiTInpaintPipeline)
    mask = torch.zeros(1, 32, 32)
    mask[:, :, 16:] = 1
    pipe(torch.rand(3, 32, 32), mask, 0, num_inference_steps=5, jump_length=2, jump_n_sample=2)
    sigmas = [call["timestep"].item() for call in calls]
    jumps = [i for i in range(1, len(sigmas)) if sigmas[i] > sigmas[i - 1]]
    assert len(jumps) == 2
    assert_handed_on(calls, begins=(0, *jumps))


def test_upscaling(make_pipeline, calls):
    pipe = make_pipeline(HDiTUpscalePipeline, conditioning_channels=4)
    pipe(torch.rand(3, 8, 8), 0, num_inference_steps=3)
    assert_handed_on(calls)
    pipe(torch.rand(3, 8, 8), 0, num_inference_steps=3, guidance_scale=2.0)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=NAMES)
def test_images_of_a_batch_equal_the_same_images_alone(make_pipeline, scheduler):
    # In float64: a product of more rows may be rounded otherwise, of which a random network makes much.
    pipe = make_pipeline(scheduler=scheduler).to(torch.float64)

    def generate(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(
            labels, generator=generators, num_inference_steps=4, guidance_scale=1.5, output_type="latent"
        ).images

    both, alone = generate([0, 2], [7, 8]), torch.cat((generate([0], [7]), generate([2], [8])))
    assert relative_error(both, alone) < 1e-5
    assert torch.equal(both, generate([0, 2], [7, 8])), "a call leaves nothing behind for the next one"


def test_saved_and_loaded(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = HDiTPipeline.from_pretrained(tmp_path)
    generate = lambda p: p(0, latents=image(0, 1, 3, 32, 32), num_inference_steps=3, output_type="latent").images  # noqa: E731
    assert torch.equal(generate(loaded), generate(pipe))


def test_the_ode_is_that_of_the_model_without_estimates(make_pipeline):
    pipe = make_pipeline()
    denoiser = probability_flow.denoiser_of(pipe, [0, 2])
    x = 3 * image(0, 2, 3, 32, 32)
    with torch.no_grad():
        expected = denoised(pipe.transformer, x, 3.0, torch.tensor([0, 2]), torch.zeros_like(x))
        torch.testing.assert_close(denoiser(x, 3.0), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(denoiser(x, 3.0), denoiser(x, 3.0))


# ----------------------------------------------------------------------------------------------------------------------
# The training script


MODEL = {**CONFIG["model"], "self_conditioning": True}


@pytest.mark.slow
def test_exact_resume(tmp_path):
    """With dropout, augmentation, bfloat16 and gradient checkpointing, which both passes have to do with."""
    settings = {"random_flip": False, "augment_prob": 0.3, "mixed_precision": "bf16", "gradient_checkpointing": "0"}
    config, whole, resumed = write_config(tmp_path, model=MODEL, **settings), tmp_path / "whole", tmp_path / "resumed"
    run(TRAIN, "--config", config, "--output_dir", whole)
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)
    run(TRAIN, "--config", config, "--output_dir", resumed)
    assert equal(weights(whole), weights(resumed)) and losses(whole) == losses(resumed)
    assert (whole / "samples" / "final.png").read_bytes() == (resumed / "samples" / "final.png").read_bytes()
    pipe = HDiTPipeline.from_pretrained(whole)
    assert pipe.transformer.config.self_conditioning
    assert weights(whole)["patch_in.proj.weight"].shape == (32, 2 * 2 * 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind, tmp_path):
    """The order of additions differs, and AdamW amplifies rounding where a gradient is nearly zero."""
    config = write_config(tmp_path, model={**MODEL, "dropout": 0.0}, max_train_steps=8, validation_steps=1000)
    run(TRAIN, "--config", config, "--output_dir", tmp_path / "one")
    launch(kind, "--config", config, "--output_dir", tmp_path / "two", "--train_batch_size", 4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max().item() for name in one) <= 1e-3
