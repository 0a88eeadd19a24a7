import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from PIL import Image

from diffusers_hdit import HDiTModel, HDiTPipeline


SCHEDULER = {"sigma_min": 0.01, "sigma_max": 80.0, "sigma_data": 0.5}
NAMES = {0: "rose", 1: "tulip", 2: "daisy"}


@pytest.fixture
def make_pipeline(make_model):
    def make(id2label=None, condition_columns=None, **overrides):
        pipeline = HDiTPipeline(
            make_model(**overrides),
            EDMDPMSolverMultistepScheduler(**SCHEDULER),
            id2label=id2label,
            condition_columns=condition_columns,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def calls(monkeypatch):
    """Records the keyword arguments of every evaluation of the network, which runs as usual."""
    recorded = []
    forward = HDiTModel.forward

    def recording(self, sample, timestep, **kwargs):
        recorded.append({"sample": sample, "timestep": timestep, **kwargs})
        return forward(self, sample, timestep, **kwargs)

    monkeypatch.setattr(HDiTModel, "forward", recording)
    return recorded


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_few_lines_a_user_types(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    pipe = HDiTPipeline.from_pretrained(tmp_path)
    images = pipe(num_inference_steps=3).images
    assert isinstance(images[0], Image.Image) and images[0].size == (32, 32) and images[0].mode == "RGB"


def test_output_types(make_pipeline):
    pipe = make_pipeline()

    def draw(output_type):
        return pipe(num_inference_steps=3, num_images_per_prompt=2, generator=seeded(), output_type=output_type).images

    latent, pt, array, pil = (draw(output_type) for output_type in ("latent", "pt", "np", "pil"))
    assert latent.shape == (2, 3, 32, 32) and latent.dtype == torch.float32
    assert latent.abs().max() > 1, "not clamped"
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.stack([np.asarray(image) for image in pil]) / 255, array, atol=0.5 / 255 + 1e-6)
    assert isinstance(pipe(num_inference_steps=1, return_dict=False), tuple)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_channels(make_pipeline, channels):
    pipe = make_pipeline(in_channels=channels)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, channels)
    if channels == 12:
        with pytest.raises(ValueError, match="PIL has no images of 12 channels; use output_type='np'"):
            pipe(num_inference_steps=2)
    else:
        assert pipe(num_inference_steps=2).images[0].mode == {1: "L", 4: "RGBA"}[channels]


def test_starts_from_the_first_sigma(make_pipeline, calls):
    pipe = make_pipeline()
    noise = torch.randn(2, 3, 24, 40, generator=seeded())
    pipe(latents=noise, num_inference_steps=2, output_type="latent")
    c_in = 1 / (SCHEDULER["sigma_max"] ** 2 + SCHEDULER["sigma_data"] ** 2) ** 0.5
    torch.testing.assert_close(calls[0]["sample"], noise * SCHEDULER["sigma_max"] * c_in)
    torch.testing.assert_close(calls[0]["timestep"], torch.tensor(SCHEDULER["sigma_max"]).log() / 4)


def test_the_solver_runs_in_float32(make_pipeline, make_model):
    """A bfloat16 model on the exact trajectory: latents and scheduler state stay float32."""
    pipe = make_pipeline()
    pipe.transformer.to(torch.bfloat16)
    seen = []
    pipe(
        num_inference_steps=3,
        callback_on_step_end=lambda p, i, t, tensors: seen.append(
            (tensors["latents"].dtype, p.scheduler.model_outputs[-1].dtype, p.scheduler.sigmas.dtype)
        ),
    )
    assert set(seen) == {(torch.float32,) * 3}


def test_labels_by_number_name_list_and_tensor(make_pipeline, calls):
    pipe = make_pipeline(num_classes=3, id2label=NAMES)
    assert pipe.id2label == NAMES
    assert pipe.get_label_ids(["tulip"]) == [1] and pipe.get_label_ids("daisy") == [2]
    for labels, expected in (
        (1, [1]),
        ("tulip", [1]),
        (["daisy", "rose"], [2, 0]),
        ([2, "tulip", 3], [2, 1, 3]),
        (torch.tensor([0, 1]), [0, 1]),
        (None, [3]),
    ):
        calls.clear()
        images = pipe(labels, num_inference_steps=1).images
        assert len(images) == len(expected)
        assert calls[0]["class_labels"].tolist() == expected
    calls.clear()
    pipe(["rose", "tulip"], num_images_per_prompt=2, num_inference_steps=1)
    assert calls[0]["class_labels"].tolist() == [0, 0, 1, 1]


def test_names_survive_saving(make_pipeline, tmp_path, capfd):
    make_pipeline(num_classes=3, id2label=NAMES).save_pretrained(tmp_path)
    pipe = HDiTPipeline.from_pretrained(tmp_path)
    assert "Expected types" not in "".join(capfd.readouterr()), "no complaint about what it wrote itself"
    assert pipe.id2label == NAMES
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_hdit", "HDiTPipeline"], "what published repositories say"
    assert index["transformer"] == ["modeling_hdit", "HDiTModel"]
    pipe.set_progress_bar_config(disable=True)
    pipe("tulip", num_inference_steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_in_half_precision_and_sample(make_pipeline, tmp_path, dtype):
    make_pipeline().save_pretrained(tmp_path)
    pipe = HDiTPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_inference_steps=2, output_type="latent").images
    assert pipe.transformer.dtype == dtype and images.dtype == torch.float32 and images.isfinite().all()


def test_guidance_by_hand_in_one_batched_call(make_pipeline, calls):
    """One Euler step computed here from two separate evaluations."""
    pipe = make_pipeline(num_classes=3)
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    noise, scale = torch.randn(2, 3, 32, 32, generator=seeded()), 2.5
    image = pipe([0, 2], latents=noise, num_inference_steps=1, guidance_scale=scale, output_type="latent").images
    assert len(calls) == 1 and len(calls[0]["sample"]) == 4
    assert calls[0]["class_labels"].tolist() == [3, 3, 0, 2]

    sigma, sigma_data = SCHEDULER["sigma_max"], SCHEDULER["sigma_data"]
    norm = (sigma**2 + sigma_data**2) ** 0.5
    x = noise * sigma
    with torch.no_grad():
        timestep = torch.tensor(sigma).log() / 4
        denoised = [
            x * (sigma_data / norm) ** 2
            + pipe.transformer(x / norm, timestep, class_labels=torch.tensor(labels)).sample
            * sigma
            * sigma_data
            / norm
            for labels in ([3, 3], [0, 2])
        ]
    # The only step ends at sigma = 0, where it returns the denoised image.
    torch.testing.assert_close(image, denoised[0] + scale * (denoised[1] - denoised[0]), rtol=1e-4, atol=1e-4)


def test_guidance_interval(make_pipeline, calls):
    pipe = make_pipeline(num_classes=3)
    pipe(0, num_inference_steps=8, guidance_scale=2.0, guidance_interval=(0.2, 5.0))
    sigmas = pipe.scheduler.sigmas[:-1]
    expected = [2 if 0.2 < sigma <= 5.0 else 1 for sigma in sigmas.tolist()]
    assert [len(call["sample"]) for call in calls] == expected and set(expected) == {1, 2}


def test_mapping_cond(make_pipeline, calls, tmp_path):
    columns = {"names": ["temperature", "pressure"], "mean": [10.0, 0.0], "std": [2.0, 0.5]}
    make_pipeline(mapping_cond_dim=2, condition_columns=columns).save_pretrained(tmp_path)
    pipe = HDiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe(mapping_cond={"pressure": 1.0, "temperature": [12.0, 6.0]}, num_inference_steps=1, guidance_scale=1.5)
    assert calls[0]["mapping_cond"].tolist() == [[0, 0], [0, 0], [1, 2], [-2, 2]]
    assert len(pipe(mapping_cond=torch.zeros(3, 2), num_inference_steps=1).images) == 3
    columns = {"pressure": torch.ones(1, device="meta"), "temperature": 12.0}
    with pytest.raises(NotImplementedError, match="no data"):
        pipe.encode_columns(columns)  # it goes to the CPU, where the means are
    with pytest.raises(ValueError, match=r"mapping_cond names \['wind'\].*columns \['temperature', 'pressure'\]"):
        pipe(mapping_cond={"wind": 1.0})
    with pytest.raises(ValueError, match=r"mapping_cond must have shape \(batch, 2\), got \(1, 3\)"):
        pipe(mapping_cond=torch.zeros(1, 3))


def test_callback_sees_and_changes_latents_and_can_stop(make_pipeline, calls):
    pipe = make_pipeline()
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append((step, float(timestep)))
        pipeline._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    image = pipe(num_inference_steps=5, callback_on_step_end=callback, output_type="latent").images
    assert [step for step, _ in steps] == [0, 1, 2] and len(calls) == 3
    assert image.abs().max() == 0
    assert pipe.num_timesteps == 5


def test_generators(make_pipeline):
    """An image depends on its own generator, not on the batch it is drawn in."""
    pipe = make_pipeline()

    def draw(generator, n):
        return pipe(num_inference_steps=3, num_images_per_prompt=n, generator=generator, output_type="latent").images

    assert torch.equal(draw(seeded(), 2), draw(seeded(), 2))
    together = draw([seeded(1), seeded(2)], 2)
    alone = torch.cat([draw([seeded(i)], 1) for i in (1, 2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="2 generators were given for 3 images"):
        draw([seeded(1), seeded(2)], 3)


def test_other_edm_schedulers(make_pipeline):
    pipe = make_pipeline()
    for scheduler in (
        EDMEulerScheduler.from_config(pipe.scheduler.config),
        EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++"),
    ):
        pipe.scheduler = scheduler
        first, second = (
            pipe(num_inference_steps=4, generator=seeded(), output_type="latent").images for _ in range(2)
        )
        assert torch.equal(first, second) and first.isfinite().all()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler is not an EDM scheduler"):
        pipe()


def test_progress_bar(make_pipeline, capfd):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe(num_inference_steps=2)
    assert "2/2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 3, "num_images_per_prompt": 0}, "num_images_per_prompt must be a positive integer"),
        ({"class_labels": -1}, "class label -1 is out of range: this model has the classes 0 to 2"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": [0, 4]}, "class label 4 is out of range"),
        ({"class_labels": "lily"}, "there is no class 'lily'; the classes are: 'rose', 'tulip', 'daisy'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive integer, got 0"),
        ({"output_type": "jpg"}, "output_type must be one of 'pil', 'np', 'pt', 'latent'; got 'jpg'"),
        ({"height": 0}, "height 0 must be a multiple of 8"),
        ({"height": 36}, "36×32 images: height 36 must be a multiple of 8"),
        ({"latents": torch.zeros(1, 1, 32, 32)}, r"latents must have shape \(1, 3, 32, 32\), got \(1, 1, 32, 32\)"),
        ({"latents": torch.zeros(5)}, r"latents must be a tensor \(B, C, H, W\), got torch.Size\(\[5\]\)"),
        ({"latents": torch.zeros(2, 3, 32, 32), "num_images_per_prompt": 3}, r"latents must have shape \(3, 3, 32, 32\)"),
        ({"height": "32"}, "height must be an integer, got '32'"),
        ({"width": 32.0}, "width must be an integer, got 32.0"),
        ({"generator": (seeded(), seeded())}, "2 generators were given for 1 images"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
        ({"guidance_interval": (3.0, 1.0)}, r"guidance_interval must be \(sigma_lo, sigma_hi\)"),
        ({"mapping_cond": torch.zeros(1, 2)}, "mapping_cond_dim=0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs must be in"),
    ],
)  # fmt: skip
def test_errors_before_the_first_evaluation(make_pipeline, calls, arguments, message):
    pipe = make_pipeline(num_classes=3, id2label=NAMES)
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
    assert not calls


def test_labels_that_are_no_labels(make_pipeline):
    pipe = make_pipeline(num_classes=3)
    assert len(pipe(np.int64(2), num_inference_steps=1).images) == 1
    with pytest.raises(ValueError, match="class numbers or names"):
        pipe([1.9])


def test_a_model_whose_output_is_no_image_of_its_input(make_pipeline):
    with pytest.raises(ValueError, match="as many output as input channels; this one has 1 and 3"):
        make_pipeline(out_channels=1)()


def test_labels_for_an_unconditional_model(make_pipeline):
    with pytest.raises(ValueError, match="trained without classes"):
        make_pipeline()(0)


@pytest.mark.parametrize(("height", "width"), [(24, 40), (48, None), (None, 24)])
def test_other_sizes_than_trained(make_pipeline, height, width):
    """The positions fill [-1, 1] along the longer side of what is drawn, as in the paper."""
    pipe = make_pipeline()
    expected = (height or 32, width or 32)
    seen = []
    original = pipe.transformer.rotary_tables
    pipe.transformer.rotary_tables = lambda *args: (seen.append(original(*args)), original(*args))[1]
    image = pipe(height=height, width=width, num_inference_steps=1, output_type="np").images
    assert image.shape == (1, *expected, 3)
    cos, _ = seen[0][0]
    assert cos.shape[:2] == (expected[0] // 2, expected[1] // 2)
    # The first frequency of the first head is π: the outermost centres along the longer side are at ±(1 - 1/n).
    n = max(cos.shape[:2])
    along = cos[:, 0, 0, 0] if expected[0] >= expected[1] else cos[0, :, 0, cos.shape[-1] // 2]
    assert along[0].item() == pytest.approx(np.cos(np.pi * (1 - 1 / n)), abs=1e-5)
