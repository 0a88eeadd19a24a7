"""Image to image, inpainting and upscaling, with small random networks; and how the pipelines become one another."""

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from PIL import Image

from diffusers_hdit import (
    DPMSolverPP3MSDEScheduler,
    EDMHeunScheduler,
    HDiTImg2ImgPipeline,
    HDiTInpaintPipeline,
    HDiTModel,
    HDiTPipeline,
    HDiTUpscalePipeline,
    upscaling,
)
from diffusers_hdit.pipelines import image_inputs


SIGMAS = {"sigma_min": 0.01, "sigma_max": 80.0, "sigma_data": 0.5}
SCHEDULERS = [
    EDMDPMSolverMultistepScheduler(**SIGMAS),
    EDMDPMSolverMultistepScheduler(**SIGMAS, algorithm_type="sde-dpmsolver++", solver_type="heun"),
    DPMSolverPP3MSDEScheduler(**SIGMAS),
    EDMHeunScheduler(**SIGMAS),
]


@pytest.fixture
def make_pipeline(make_model):
    def make(cls=HDiTPipeline, scheduler=SCHEDULERS[0], **overrides):
        pipeline = cls(make_model(**{"num_classes": 3, **overrides}), scheduler, id2label=dict(enumerate("abc")))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def calls(monkeypatch):
    recorded = []
    forward = HDiTModel.forward

    def recording(self, sample, timestep, **kwargs):
        recorded.append({"sample": sample, "timestep": timestep, **kwargs})
        return forward(self, sample, timestep, **kwargs)

    monkeypatch.setattr(HDiTModel, "forward", recording)
    return recorded


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed=0, size=(32, 32), mode="RGB"):
    channels = {"RGB": 3, "L": 1}[mode]
    pixels = torch.randint(0, 256, (*size, channels), generator=seeded(seed), dtype=torch.uint8).numpy()
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def half_mask(size=(32, 32)):
    """White on the right."""
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 2 :] = 255
    return Image.fromarray(mask)


# ----------------------------------------------------------------------------------------------------------------------
# Image to image


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_img2img_starts_at_its_noise_level(make_pipeline, calls, strength):
    pipe = make_pipeline(HDiTImg2ImgPipeline)
    image, noise = picture(), torch.randn(1, 3, 32, 32, generator=seeded())
    pipe(image, 1, strength=strength, num_inference_steps=10, latents=noise)
    assert len(calls) == round(10 * strength) == pipe.num_timesteps
    sigma = pipe.scheduler.sigmas[10 - len(calls)].item()
    clean = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
    expected = (clean + sigma * noise) / (sigma**2 + 0.25) ** 0.5
    torch.testing.assert_close(calls[0]["sample"], expected, rtol=1e-5, atol=1e-5)
    assert calls[0]["timestep"].item() == pytest.approx(np.log(sigma) / 4, abs=1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_img2img_with_every_sampler(make_pipeline, scheduler):
    """From a low noise level an image comes back nearly as it was; the network is random, but sees hardly any noise."""
    pipe = make_pipeline(HDiTImg2ImgPipeline, scheduler)
    image = picture()
    near = pipe(image, strength=0.2, num_inference_steps=10, generator=seeded(), output_type="latent").images
    clean = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
    assert (near - clean).abs().mean() < 0.2
    assert pipe.num_timesteps == (3 if scheduler.order == 2 else 2)
    far = pipe(image, strength=1.0, num_inference_steps=10, generator=seeded(), output_type="latent").images
    assert (far - clean).abs().mean() > (near - clean).abs().mean()


def test_img2img_batches(make_pipeline):
    """Images, labels and copies; image i depends on its own generator only; the three kinds of images are one."""
    pipe = make_pipeline(HDiTImg2ImgPipeline)
    pictures = [picture(1), picture(2)]

    def draw(image, labels, seeds, **kwargs):
        generators = [seeded(seed) for seed in seeds]
        return pipe(image, labels, num_inference_steps=4, generator=generators, output_type="latent", **kwargs).images

    both = draw(pictures, ["a", "c"], [1, 2])
    alone = torch.cat((draw(pictures[0], "a", [1]), draw(pictures[1], "c", [2])))
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)
    copies = draw(pictures[0], None, [1, 2, 3], num_images_per_prompt=3)
    assert len(copies) == 3 and not torch.equal(copies[0], copies[1])
    assert len(draw(pictures[0], [0, 1, 2], [1, 2, 3])) == 3
    array = np.stack([np.asarray(p) for p in pictures]) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for same in (array, tensor, list(tensor), [array[0], array[1]]):
        torch.testing.assert_close(draw(same, ["a", "c"], [1, 2]), both)


def test_img2img_of_another_size(make_pipeline):
    pipe = make_pipeline(HDiTImg2ImgPipeline)
    assert pipe(picture(size=(24, 40)), num_inference_steps=2).images[0].size == (40, 24)


# ----------------------------------------------------------------------------------------------------------------------
# Inpainting


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("jump_n_sample", [1, 3])
def test_inpainting_keeps_what_is_not_masked(make_pipeline, scheduler, jump_n_sample):
    pipe = make_pipeline(HDiTInpaintPipeline, scheduler)
    image, mask = picture(), half_mask()
    drawn = pipe(image, mask, 0, num_inference_steps=6, jump_length=2, jump_n_sample=jump_n_sample).images[0]
    before, after = np.asarray(image), np.asarray(drawn)
    assert np.array_equal(before[:, :16], after[:, :16]), "to the 8 bits"
    assert not np.array_equal(before[:, 16:], after[:, 16:])


def test_inpainting_shows_the_network_the_known_part(make_pipeline, calls):
    """At each noise level the known part is the image and fresh noise; the rest is what was drawn."""
    pipe = make_pipeline(HDiTInpaintPipeline)
    image = picture()
    pipe(image, half_mask(), num_inference_steps=30, jump_n_sample=1, generator=seeded())
    clean = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
    assert len(calls) == 30
    noises = []
    for call, sigma in zip(calls, pipe.scheduler.sigmas.tolist(), strict=False):
        noised = call["sample"] * (sigma**2 + 0.25) ** 0.5
        noises.append((noised - clean)[..., :16] / sigma)
        # 1536 values: the deviation of their spread is 0.018.
        assert 0.9 < noises[-1].std() < 1.1
    assert (noises[3] * noises[4]).mean().abs() < 0.1


def test_jumps(make_pipeline, calls):
    """RePaint's schedule: stretches from the end, each run n times but for the noisiest."""
    pipe = make_pipeline(HDiTInpaintPipeline)
    pipe(picture(), half_mask(), num_inference_steps=7, jump_length=3, jump_n_sample=2)
    levels = [(c["timestep"] * 4).exp().item() for c in calls]
    sigmas = pipe.scheduler.sigmas.tolist()
    order = [0, *[1, 2, 3] * 2, *[4, 5, 6] * 2]
    assert levels == pytest.approx([sigmas[i] for i in order], rel=1e-4)
    assert pipe.num_timesteps == len(order)
    pipe.scheduler = EDMHeunScheduler(**SIGMAS)
    calls.clear()
    pipe(picture(), half_mask(), num_inference_steps=4, jump_length=2, jump_n_sample=2)
    levels = [(c["timestep"] * 4).exp().item() for c in calls]
    s = pipe.scheduler.sigmas.tolist()
    # 0>1>2, 2>3>end, back to 2, 2>3>end: two evaluations a step, one in the last.
    assert levels == pytest.approx([s[i] for i in (*range(4), *range(4, 7), *range(4, 7))], rel=1e-4)


def test_jumps_add_the_noise_between_the_levels(make_pipeline, monkeypatch):
    pipe = make_pipeline(HDiTInpaintPipeline)
    pipe.scheduler.set_timesteps(6)
    sigmas = pipe.scheduler.sigmas.tolist()
    noises, ended, began = [], [], []
    noise = pipe.noise
    monkeypatch.setattr(pipe, "noise", lambda *args: noises.append(noise(*args)) or noises[-1])
    x = 80 * torch.randn(1, 3, 32, 32, generator=seeded())
    with torch.no_grad():
        pipe.denoise(
            x,
            pipe.encode_conditions(0, None, 1)[0],
            callback=lambda step, t, latents: ended.append(latents) or latents,
            runs=[range(0, 4), range(1, 4), range(1, 6)],
            before_step=lambda i, latents: began.append((i, latents)) or latents,
        )
    assert [i for i, _ in began] == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5] and len(noises) == 2
    for number, first in enumerate((4, 7)):
        expected = ended[first - 1] + (sigmas[1] ** 2 - sigmas[4] ** 2) ** 0.5 * noises[number]
        torch.testing.assert_close(began[first][1], expected)


def test_the_known_part_is_put_in_between_steps_only(make_pipeline):
    """Not in the middle of Heun's step, whose two evaluations belong together."""
    pipe = make_pipeline(HDiTInpaintPipeline, EDMHeunScheduler(**SIGMAS))
    pipe.scheduler.set_timesteps(3)
    image, x = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    kept = [
        torch.equal(
            pipe.before_step({"image": image, "mask": mask}, pipe.scheduler.sigmas.tolist(), seeded(), i, x), x
        )
        for i in range(5)
    ]
    assert kept == [False, True, False, True, False]


@pytest.mark.parametrize("scheduler", SCHEDULERS[1:3], ids=lambda s: type(s).__name__)
def test_a_jump_goes_back_to_its_noise_level(make_pipeline, scheduler):
    pipe = make_pipeline(HDiTInpaintPipeline, scheduler)
    pipe.scheduler.set_timesteps(5)
    x = torch.randn(4, 3, 32, 32, generator=seeded()) * 2.0
    pipe.scheduler.set_begin_index(0)
    for t in pipe.scheduler.timesteps[:3]:
        pipe.scheduler.step(torch.zeros_like(x), t, x)
    x = torch.randn(4, 3, 32, 32, generator=seeded()) * 2.0
    up = pipe.jump(x, 2.0, 5.0, seeded(1))
    assert up.std() == pytest.approx(5.0, rel=0.03)
    assert ((up - x) * x).mean().abs() < 0.3, "fresh noise"
    assert pipe.scheduler.step_index is None
    if isinstance(scheduler, EDMDPMSolverMultistepScheduler):
        assert pipe.scheduler.lower_order_nums == 0 and not any(d is not None for d in pipe.scheduler.model_outputs)
    else:
        assert not pipe.scheduler._history, "no memory of later steps"


def test_masks(make_pipeline):
    pipe = make_pipeline(HDiTInpaintPipeline)
    white = np.asarray(half_mask()) / 255.0

    def draw(mask):
        arguments = {"num_inference_steps": 2, "jump_n_sample": 1, "output_type": "latent"}
        return pipe(picture(), mask, generator=seeded(), **arguments).images

    expected = draw(half_mask())
    tensor = torch.from_numpy(white)
    for mask in (white, tensor, tensor.bfloat16(), white[..., None], tensor[None, None], [half_mask()]):
        torch.testing.assert_close(draw(mask), expected)
    arguments = {"num_inference_steps": 1, "jump_n_sample": 1}
    assert len(pipe([picture(1), picture(2)], [half_mask(), white], **arguments).images) == 2
    two = pipe([picture(1), picture(2)], half_mask(), num_inference_steps=1).images
    assert len(two) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Upscaling

UPSCALER = {"conditioning_channels": 4, "num_classes": None}


def test_conditioning_image_by_hand():
    image = torch.rand(2, 3, 16, 24, generator=seeded()) * 2 - 1
    small = upscaling.downscale(image, 4)
    assert small.shape == (2, 3, 4, 6) and small.abs().max() <= 1
    grey_levels = (small + 1) * 127.5
    torch.testing.assert_close(grey_levels.round(), grey_levels, rtol=0, atol=1e-4)
    block = torch.full((1, 3, 8, 8), 0.2)
    torch.testing.assert_close(upscaling.downscale(block, 4), torch.full((1, 3, 2, 2), 153 / 127.5 - 1))
    noise = torch.randn(2, 3, 16, 24, generator=seeded(1))
    enlarged = upscaling.conditioning_image(small, 4, 0.0)
    levels = torch.tensor([0.6, 0.3])
    disturbed = upscaling.conditioning_image(small, 4, levels, noise)
    for i, s in enumerate(levels):
        expected = (1 - s**2).sqrt() * enlarged[i, :3] + s * noise[i]
        torch.testing.assert_close(disturbed[i, :3], expected)
        assert (disturbed[i, 3] == s).all() and (enlarged[i, 3] == 0).all()
    with pytest.raises(ValueError, match="noise is missing"):
        upscaling.conditioning_image(small, 4, 0.1)
    with pytest.raises(ValueError, match="must be at least 2 and divide the image; got 5 for 16×24"):
        upscaling.downscale(image, 5)
    small = upscaling.downscale(image, 4)
    expected = upscaling.conditioning_image(small, 4, levels[:1], noise[:1])
    assert torch.equal(upscaling.training_conditioning(image, 4, levels[:1], noise[:1]), expected)


def test_upscaling(make_pipeline, calls):
    pipe = make_pipeline(HDiTUpscalePipeline, **UPSCALER)
    small = picture(size=(8, 10))
    drawn = pipe(small, num_inference_steps=3, generator=seeded()).images[0]
    assert drawn.size == (40, 32)
    condition = calls[0]["conditioning_image"]
    values = torch.from_numpy(np.asarray(small) / 127.5 - 1).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(condition, upscaling.conditioning_image(values, 4, 0.0))
    assert all(call["conditioning_image"] is condition for call in calls)
    calls.clear()
    pipe(small, noise_level=0.4, num_inference_steps=1, num_images_per_prompt=2, generator=[seeded(1), seeded(2)])
    noise = (calls[0]["conditioning_image"][:, :3] - (1 - 0.16) ** 0.5 * condition[:, :3]) / 0.4
    assert 0.9 < noise.std() < 1.1 and (calls[0]["conditioning_image"][:, 3] == 0.4).all()
    assert not torch.equal(noise[0], noise[1])


def test_upscaling_with_guidance_and_labels(make_pipeline, calls):
    pipe = make_pipeline(HDiTUpscalePipeline, conditioning_channels=4)
    pipe([picture(1, (8, 8)), picture(2, (8, 8))], ["a", "b"], num_inference_steps=1, guidance_scale=2.0)
    condition = calls[0]["conditioning_image"]
    assert calls[0]["class_labels"].tolist() == [3, 3, 0, 1]
    assert torch.equal(condition[:2], condition[2:]), "both halves see the image"


def test_an_upscaler_learns_through_these_functions(make_model):
    """A few steps on one image: the loss goes down and the condition has a gradient."""
    from diffusers_hdit import diffusion

    torch.manual_seed(0)
    model = HDiTModel(
        sample_size=16, patch_size=2, widths=(32,), depths=(1,), attention_head_dim=16, mapping_width=32,
        conditioning_channels=upscaling.conditioning_channels(3), augment_cond_dim=0,
    )  # fmt: skip
    image = torch.rand(8, 3, 16, 16, generator=seeded()) * 2 - 1
    level, noise = torch.rand(8, generator=seeded()) / 2, torch.randn(image.shape, generator=seeded())
    condition = upscaling.training_conditioning(image, 4, level, noise).requires_grad_()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(30):
        noise = torch.randn(image.shape, generator=seeded(step))
        loss = diffusion.loss(model, image, noise, torch.full((8,), 0.5), conditioning_image=condition).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert condition.grad.abs().max() > 0 and losses[-1] < 0.9 * losses[0]


# ----------------------------------------------------------------------------------------------------------------------
# From one to another, saved, and refused


def test_from_pipe_there_and_back(make_pipeline, caplog):
    pipe = make_pipeline()
    pipe.transformer.to(torch.bfloat16)
    caplog.clear()
    for cls in (HDiTImg2ImgPipeline, HDiTInpaintPipeline, HDiTPipeline):
        pipe = cls.from_pipe(pipe)
        assert type(pipe) is cls and pipe.id2label == {0: "a", 1: "b", 2: "c"}
        assert pipe.transformer.dtype == torch.bfloat16
    assert not caplog.text, "no complaints"
    with pytest.raises(ValueError, match="this model has conditioning_channels=0; one that upscales .* has 4"):
        HDiTUpscalePipeline.from_pipe(pipe)
    upscaler = make_pipeline(HDiTUpscalePipeline, conditioning_channels=4)
    upscaler.register_to_config(upscale_factor=2)
    assert HDiTUpscalePipeline.from_pipe(HDiTPipeline.from_pipe(upscaler)).config.upscale_factor == 2
    assert HDiTPipeline.from_pipe(pipe, torch_dtype=torch.float32).transformer.dtype == torch.float32
    other = make_pipeline().transformer
    assert HDiTImg2ImgPipeline.from_pipe(pipe, transformer=other).transformer is other


@pytest.mark.parametrize("cls", [HDiTImg2ImgPipeline, HDiTInpaintPipeline, HDiTUpscalePipeline])
def test_saved_and_loaded(make_pipeline, tmp_path, cls):
    upscales = cls is HDiTUpscalePipeline
    pipe = make_pipeline(cls, **({"conditioning_channels": 4} if upscales else {}))
    if upscales:
        pipe.register_to_config(upscale_factor=2, max_noise_level=0.3)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / f"{cls.__module__.rpartition('.')[2]}.py").is_file()
    loaded = cls.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    if upscales:
        assert (loaded.config.upscale_factor, loaded.config.max_noise_level) == (2, 0.3)
    arguments = (
        (picture(size=(16, 16)), half_mask((16, 16))) if cls is HDiTInpaintPipeline else (picture(size=(16, 16)),)
    )
    draw = lambda p: p(*arguments, num_inference_steps=2, generator=seeded(), output_type="latent").images  # noqa: E731
    assert torch.equal(draw(loaded), draw(pipe))
    if not upscales:
        assert type(HDiTPipeline.from_pretrained(tmp_path)) is HDiTPipeline


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (HDiTImg2ImgPipeline, {"strength": 0.0}, r"strength must be above 0 and at most 1, got 0.0"),
        (HDiTImg2ImgPipeline, {"strength": 1.1}, r"strength must be above 0 and at most 1, got 1.1"),
        (HDiTImg2ImgPipeline, {"strength": 0.04, "num_inference_steps": 10}, "less than one; .*num_inference_steps=26"),
        (HDiTImg2ImgPipeline, {"image": torch.zeros(1, 32, 32)}, "image has 1 channels, this model takes 3"),
        (HDiTImg2ImgPipeline, {"image": picture().convert("L").convert("I")}, "image has mode I; convert it to L, RGB"),
        (HDiTInpaintPipeline, {"mask_image": None}, "mask_image must be PIL images, arrays or tensors, got NoneType"),
        (HDiTImg2ImgPipeline, {"image": [picture(), picture(size=(24, 24))]}, "must have one shape"),
        (HDiTImg2ImgPipeline, {"image": torch.full((3, 32, 32), -1.0)}, "values from 0 to 1, got -1"),
        (HDiTImg2ImgPipeline, {"image": "cat.png"}, "PIL images, arrays or tensors, got str"),
        (HDiTImg2ImgPipeline, {"image": [picture()] * 2, "class_labels": [0, 1, 2]}, "2 image were given, but 3 of another"),
        (HDiTImg2ImgPipeline, {"generator": [seeded(), seeded()]}, "2 generators were given for 1 images"),
        (HDiTImg2ImgPipeline, {"latents": torch.zeros(1, 3, 24, 32)}, r"latents must have shape \(1, 3, 32, 32\)"),
        (HDiTInpaintPipeline, {"mask_image": half_mask((24, 32))}, "size of the image, 32×32 .*; got 24×32"),
        (HDiTInpaintPipeline, {"mask_image": half_mask(), "jump_length": 0}, "jump_length must be a positive integer"),
        (HDiTInpaintPipeline, {"mask_image": np.full((32, 32), 255.0)}, "mask_image must have values from 0 to 1"),
        (HDiTUpscalePipeline, {"noise_level": 0.6}, "noise_level must be from 0 to 0.5, got 0.6"),
        (HDiTUpscalePipeline, {"image": picture(size=(9, 8))}, "36×32 images: height 36"),
        (HDiTPipeline, {"image": None}, "it upscales images"),
    ],
)  # fmt: skip
def test_errors_before_the_first_evaluation(make_pipeline, calls, cls, arguments, message):
    if cls is HDiTPipeline:
        pipe, arguments = HDiTPipeline.from_pipe(make_pipeline(HDiTUpscalePipeline, conditioning_channels=4)), {}
    else:
        pipe = make_pipeline(cls, **({"conditioning_channels": 4} if cls is HDiTUpscalePipeline else {}))
        arguments = {"image": picture(), **arguments}
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
    assert not calls


def test_a_misspelt_argument(make_pipeline):
    with pytest.raises(TypeError, match="guidance_scal"):
        make_pipeline(HDiTImg2ImgPipeline)(picture(), guidance_scal=2.0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "PA", "1", "YCbCr"])
def test_images_of_other_modes_are_converted(make_model, mode):
    """As Diffusers' `load_image` does it: alpha is dropped, palettes are looked up."""
    image = picture().convert(mode)
    arguments = {"strength": 0.5, "num_inference_steps": 2, "output_type": "pt"}
    pipe = HDiTImg2ImgPipeline(make_model(), EDMEulerScheduler())
    found = pipe(image, generator=seeded(), **arguments).images
    assert torch.equal(found, pipe(image.convert("RGB"), generator=seeded(), **arguments).images)


@pytest.mark.parametrize(
    ("size", "expected"), [((30, 32), (32, 32)), ((45, 27), (48, 24)), ((5, 100), (16, 96)), ((32, 32), (32, 32))]
)
def test_other_sizes_are_resized_to_the_nearest(make_model, size, expected, monkeypatch):
    model = make_model()
    said = []
    monkeypatch.setattr(image_inputs.logger, "warning", said.append)
    image = picture(size=size)
    arguments = {"strength": 0.5, "num_inference_steps": 2, "output_type": "pt", "generator": seeded()}
    assert HDiTImg2ImgPipeline(model, EDMEulerScheduler())(image, **arguments).images.shape[-2:] == expected
    mask = torch.zeros(1, *size)
    mask[:, : size[0] // 2] = 1
    kept = HDiTInpaintPipeline(model, EDMEulerScheduler())(image, mask, **arguments).images
    assert kept.shape[-2:] == expected
    if size != expected:
        assert f"from {size[0]}×{size[1]} to {expected[0]}×{expected[1]}" in said[0]
    else:
        assert not said
