"""Every formula computed by hand, with numpy in float64; and how a pipeline applies it."""

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from diffusers_hdit import DPMSolverPP3MSDEScheduler, EDMHeunScheduler, HDiTModel, HDiTPipeline, guidance
from diffusers_hdit.pipelines.guidance import AdaptiveProjection, Guidance


SIGMAS = {"sigma_min": 0.01, "sigma_max": 80.0, "sigma_data": 0.5}


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 3, 4, 4, generator=generator, dtype=torch.float64).unbind(0)


def numpy(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


def test_extrapolate(predictions):
    weak, strong = predictions
    w, s = numpy(weak, strong)
    for scale in (0.0, 1.0, 1.5, 4.0):
        found = guidance.extrapolate(weak, strong, scale)
        np.testing.assert_allclose(found, w + scale * (s - w), rtol=1e-12)
    assert torch.equal(guidance.extrapolate(weak, strong, 1.0), strong)


def test_interval():
    inside = [sigma for sigma in (0.1, 0.2, 0.3, 5.0, 5.1) if guidance.in_interval(sigma, (0.2, 5.0))]
    assert inside == [0.3, 5.0]
    assert guidance.in_interval(1e6, None)


def test_rescale(predictions):
    guided, strong = predictions
    guided = 3 * guided + 1
    found = guidance.rescale(guided, strong, 0.7)
    for i in range(3):
        g, s = numpy(guided[i], strong[i])
        expected = 0.7 * g * s.std(ddof=1) / g.std(ddof=1) + 0.3 * g
        np.testing.assert_allclose(found[i], expected, rtol=1e-12)
    torch.testing.assert_close(guidance.rescale(guided, strong, 1.0).std((1, 2, 3)), strong.std((1, 2, 3)))


@pytest.mark.parametrize("threshold", [None, 2.0, 1e3])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_adaptive_projected(predictions, eta, threshold):
    """Two steps with momentum, image by image."""
    weak, strong = predictions
    projection = AdaptiveProjection(eta, threshold, momentum=-0.5)
    running = None
    sums = [0.0] * 3
    for step in range(2):
        weak, strong = weak + step, strong * (1 + step)
        found, running = guidance.adaptive_projected(weak, strong, 4.0, projection, running)
        for i in range(3):
            w, s = numpy(weak[i], strong[i])
            sums[i] = (s - w) - 0.5 * sums[i]
            update = sums[i]
            if threshold is not None:
                update = update * min(1.0, threshold / np.linalg.norm(update))
            along = (update * s).sum() / (s * s).sum() * s
            expected = s + 3.0 * ((update - along) + eta * along)
            np.testing.assert_allclose(found[i], expected, rtol=1e-10)
    if eta == 1.0 and threshold is None:
        plain, _ = guidance.adaptive_projected(weak, strong, 4.0, AdaptiveProjection(eta=1.0))
        torch.testing.assert_close(plain, guidance.extrapolate(weak, strong, 4.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": (3.0, 1.0)}, r"guidance_interval must be \(sigma_lo, sigma_hi\)"),
        ({"rescale": 1.5}, "guidance_rescale must be from 0 to 1, got 1.5"),
        ({"projection": {"eat": 1}}, r"adaptive_projection takes \['eta', 'momentum', 'norm_threshold'\], got \['eat'\]"),
        ({"projection": {"eta": 2}}, "needs 0 <= eta <= 1"),
        ({"projection": {"norm_threshold": 0}}, "positive norm_threshold"),
        ({"projection": {"momentum": -1}}, "-1 < momentum < 1"),
        ({"scale": 1.0, "projection": True}, "do nothing at guidance_scale=1"),
        ({"scale": 1.0, "rescale": 0.5}, "do nothing at guidance_scale=1"),
        ({"scale": 1.0, "interval": (0.2, 5.0)}, "guidance_interval, .* do nothing at guidance_scale=1"),
        ({"scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"scale": "2"}, "guidance_scale must be a finite number, got '2'"),
        ({"interval": 5.0}, r"guidance_interval must be \(sigma_lo, sigma_hi\).* got 5.0"),
        ({"projection": 0.5}, "adaptive_projection must be True, a dict or AdaptiveProjection, got 0.5"),
    ],
)  # fmt: skip
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**{"scale": 2.0, **arguments})


# ----------------------------------------------------------------------------------------------------------------------
# In a pipeline


@pytest.fixture
def make_pipeline(make_model):
    def make(guidance_model=None, scheduler=None, **overrides):
        scheduler = scheduler or EDMDPMSolverMultistepScheduler(**SIGMAS, solver_order=1)
        model = make_model(**{"num_classes": 3, **overrides})
        pipeline = HDiTPipeline(model, scheduler, guidance_model=guidance_model)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def calls(monkeypatch):
    recorded = []
    forward = HDiTModel.forward

    def recording(self, sample, timestep, **kwargs):
        recorded.append((self, len(sample)))
        return forward(self, sample, timestep, **kwargs)

    monkeypatch.setattr(HDiTModel, "forward", recording)
    return recorded


def denoised(model, x, sigma, labels):
    """D by hand, in float64."""
    norm = (sigma**2 + 0.25) ** 0.5
    with torch.no_grad():
        output = model(x / norm, torch.tensor(sigma).log() / 4, class_labels=labels).sample
    return x.double() * 0.25 / norm**2 + output.double() * sigma * 0.5 / norm


NOISE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS, NO_LABELS = torch.tensor([0, 2]), torch.tensor([3, 3])


def one_step(pipeline, **arguments):
    """The only step ends at sigma 0, where it returns the guided D."""
    return pipeline([0, 2], latents=NOISE, num_inference_steps=1, output_type="latent", **arguments).images


@pytest.mark.parametrize("scheduler", [None, DPMSolverPP3MSDEScheduler(**SIGMAS), EDMHeunScheduler(**SIGMAS)])
def test_rescale_and_projection_act_on_the_denoised_image(make_pipeline, calls, scheduler):
    pipe = make_pipeline(scheduler=scheduler)
    x = 80.0 * NOISE
    weak, strong = (denoised(pipe.transformer, x, 80.0, labels) for labels in (NO_LABELS, LABELS))
    calls.clear()
    found = one_step(pipe, guidance_scale=3.0, guidance_rescale=0.7)
    expected = guidance.rescale(weak + 3 * (strong - weak), strong, 0.7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert [batch for _, batch in calls] == [4], "one batched call"
    settings = {"eta": 0.2, "norm_threshold": 1.0, "momentum": 0.5}
    found = one_step(pipe, guidance_scale=3.0, adaptive_projection=settings)
    expected, _ = guidance.adaptive_projected(weak, strong, 3.0, AdaptiveProjection(**settings))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    both = one_step(pipe, guidance_scale=3.0, adaptive_projection=settings, guidance_rescale=0.5)
    expected = guidance.rescale(expected, strong, 0.5)
    torch.testing.assert_close(both.double(), expected, rtol=1e-3, atol=1e-3)


def test_momentum_begins_anew_with_each_call(make_pipeline):
    pipe = make_pipeline()
    draw = lambda: one_step(pipe, guidance_scale=3.0, adaptive_projection={"momentum": -0.5})  # noqa: E731
    assert torch.equal(draw(), draw())


def test_autoguidance_by_hand(make_pipeline, make_model, calls):
    guide = make_model(num_classes=3, widths=(16, 32, 32), depths=(1, 1, 1))
    pipe = make_pipeline(guide)
    x = 80.0 * NOISE
    weak, strong = denoised(guide, x, 80.0, LABELS), denoised(pipe.transformer, x, 80.0, LABELS)
    calls.clear()
    found = one_step(pipe, guidance_scale=2.0)
    torch.testing.assert_close(found.double(), weak + 2 * (strong - weak), rtol=1e-3, atol=1e-3)
    assert calls == [(guide, 2), (pipe.transformer, 2)], "each network sees each image once"
    projected = one_step(pipe, guidance_scale=2.0, adaptive_projection=True)
    expected, _ = guidance.adaptive_projected(weak, strong, 2.0, AdaptiveProjection())
    torch.testing.assert_close(projected.double(), expected, rtol=1e-3, atol=1e-3)
    # An unconditional one is classifier-free guidance with a network of its own.
    guide = make_model(num_classes=None)
    pipe.register_modules(guidance_model=guide)
    found, weak = one_step(pipe, guidance_scale=2.0), denoised(guide, x, 80.0, None)
    torch.testing.assert_close(found.double(), weak + 2 * (strong - weak), rtol=1e-3, atol=1e-3)


def test_evaluations_are_what_they_must_be(make_pipeline, make_model, calls):
    """Outside of the interval there is no weak prediction, of either kind."""
    for guide in (None, make_model(num_classes=3)):
        pipe = make_pipeline(guide)
        calls.clear()
        pipe(0, num_inference_steps=8, guidance_scale=2.0, guidance_interval=(0.2, 5.0))
        inside = [0.2 < sigma <= 5.0 for sigma in pipe.scheduler.sigmas[:-1].tolist()]
        expected = []
        for i in inside:
            plain = [(pipe.transformer, 1)]
            guided = [(guide, 1), (pipe.transformer, 1)] if guide else [(pipe.transformer, 2)]
            expected += guided if i else plain
        assert calls == expected and 0 < sum(inside) < 8
        calls.clear()
        pipe(0, num_inference_steps=3)
        assert calls == [(pipe.transformer, 1)] * 3


def test_an_unconditional_model_with_a_guide(make_pipeline, make_model, calls):
    pipe = make_pipeline(make_model(), num_classes=None)
    assert pipe(num_inference_steps=2, guidance_scale=1.5, output_type="latent").images.isfinite().all()
    assert len(calls) == 4


def test_the_guide_is_saved(make_pipeline, make_model, tmp_path):
    guide = make_model(num_classes=3, depths=(1, 1, 1))
    pipe = make_pipeline(guide)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "guidance_model" / "modeling_hdit.py").is_file()
    loaded = HDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.guidance_model) is HDiTModel and loaded.guidance_model.config.depths == [1, 1, 1]
    assert torch.equal(one_step(loaded, guidance_scale=2.0), one_step(pipe, guidance_scale=2.0))
    HDiTPipeline(pipe.transformer, pipe.scheduler).save_pretrained(tmp_path / "unguided")
    added = HDiTPipeline.from_pretrained(tmp_path / "unguided", guidance_model=guide)
    added.set_progress_bar_config(disable=True)
    assert torch.equal(one_step(added, guidance_scale=2.0), one_step(pipe, guidance_scale=2.0))
    without = HDiTPipeline.from_pretrained(tmp_path, guidance_model=None)
    assert without.guidance_model is None
    assert HDiTPipeline.from_pipe(loaded).guidance_model is loaded.guidance_model
    make_pipeline().save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "guidance_model").exists()
    assert HDiTPipeline.from_pretrained(tmp_path / "plain").guidance_model is None


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ({"num_classes": 5}, "guidance_model has num_classes=5, the transformer 3; it must have the same or None"),
        ({"in_channels": 1}, "guidance_model has 1 channels, the transformer 3"),
        ({"out_channels": 1}, "guidance_model has 1 output channels, the transformer 3"),
        ({"patch_size": 3, "sample_size": 36}, "can't process 32×32 images"),
        ({"mapping_cond_dim": 2}, "guidance_model has mapping_cond_dim=2, the transformer 0"),
    ],
)
def test_a_guide_that_does_not_fit(make_pipeline, make_model, calls, guide, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(make_model(**guide))(0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs class_labels"):
        make_pipeline()(guidance_scale=2.0)
    with pytest.raises(ValueError, match="or a pipeline with a guidance_model"):
        make_pipeline(num_classes=None)(guidance_scale=2.0)
    assert not calls
