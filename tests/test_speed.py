"""What makes sampling quick: Diffusers' caches on the middle level, compilation, no waiting for the accelerator."""

import pytest
import torch
from conftest import relative_error
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

from diffusers_hdit import DPMSolverPP3MSDEScheduler, EDMHeunScheduler, HDiTPipeline
from diffusers_hdit.ops.registry import reference
from diffusers_hdit.pipelines.guidance import Guidance
from diffusers_hdit.schedulers import scheduling_edm


SIGMAS = {"sigma_min": 0.01, "sigma_max": 80.0}


@pytest.fixture
def make_pipeline(make_model):
    def make(scheduler=None, **overrides):
        model = make_model(**{"num_classes": 3, "depths": (1, 1, 4), **overrides})
        pipeline = HDiTPipeline(model, scheduler or EDMDPMSolverMultistepScheduler(**SIGMAS))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def draw(pipe, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipe(1, num_inference_steps=20, generator=generator, output_type="latent", **arguments).images


def count(modules):
    """Counts how often these modules' own code runs, below Diffusers' hooks."""
    runs = [0]
    for module in modules:
        module.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    return runs


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 2.0, "guidance_interval": (0.1, 5.0)}])
def test_first_block_cache(make_pipeline, arguments):
    pipe = make_pipeline()
    plain = draw(pipe, **arguments)
    runs = count(block.ff for block in pipe.transformer.transformer_blocks[1:])
    outer = count([pipe.transformer.down_blocks[0][0].ff])
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert relative_error(draw(pipe, **arguments), plain) < 1e-4 and runs[0] == 60, "nothing is skipped at 0"
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e3))
    runs[0] = outer[0] = 0
    first = draw(pipe, **arguments)
    # Guided steps have a batch of another size, and a memory of their own.
    assert runs[0] == (6 if arguments else 3), "run once, then skipped: a threshold that nothing reaches"
    assert outer[0] == 20, "the outer levels always run"
    assert relative_error(first, plain) > 1e-3
    assert torch.equal(draw(pipe, **arguments), first), "nothing is left of the call before"
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, **arguments), plain)


def test_taylorseer_cache(make_pipeline):
    pipe = make_pipeline()
    plain = draw(pipe)
    runs = count(block.attn.to_q for block in pipe.transformer.transformer_blocks)
    outer = count([pipe.transformer.down_blocks[0][0].attn.to_q])
    config = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=5, taylor_factors_dtype=torch.float32)
    pipe.transformer.enable_cache(config)
    cached = draw(pipe)
    assert 0 < runs[0] < 80 and outer[0] == 20
    assert 0 < relative_error(cached, plain) < 1
    assert torch.equal(draw(pipe), cached)


def test_a_cache_after_a_call_that_raised(make_pipeline):
    pipe = make_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e3))
    expected = draw(pipe)

    def failing(pipeline, step, timestep, tensors):
        if step == 3:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        draw(pipe, num_images_per_prompt=3, callback_on_step_end=failing)
    assert torch.equal(draw(pipe), expected)


def test_a_jump_forgets_caches_and_momentum(make_pipeline, monkeypatch):
    """What comes after it is what a call that begins there gives."""
    pipe = make_pipeline()
    config = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)
    pipe.transformer.enable_cache(config)
    guidance = {"scale": 2.0, "projection": {"momentum": -0.5}}
    pipe.scheduler.set_timesteps(8)
    conditions, _ = pipe.encode_conditions(1, None, 1)
    devices, after = [], []
    set_timesteps, jump = pipe.scheduler.set_timesteps, pipe.jump

    def recording(*args):
        after.append(jump(*args))
        return after[-1]

    def watched(*args, device=None):
        devices.append(device)
        return set_timesteps(*args, device=device)

    monkeypatch.setattr(pipe, "jump", recording)
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", watched)
    latents = 80 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        twice = pipe.denoise(latents, conditions, Guidance(**guidance), runs=[range(0, 8), range(2, 8)])
        assert devices == [None], "sigmas are not read back from an accelerator"
        pipe.scheduler.set_timesteps(8)
        alone = pipe.denoise(after[0], conditions, Guidance(**guidance), runs=[range(2, 8)])
    assert len(after) == 1 and torch.equal(twice, alone)


def test_a_middle_level_too_short_to_cache(make_pipeline):
    with pytest.raises(ValueError, match="the middle level has 1 blocks; caching needs two or more"):
        make_pipeline(depths=(1, 1, 1)).transformer.enable_cache(FirstBlockCacheConfig())


@pytest.mark.parametrize(
    "scheduler",
    [EDMDPMSolverMultistepScheduler(**SIGMAS), DPMSolverPP3MSDEScheduler(**SIGMAS), EDMHeunScheduler(**SIGMAS)],
)
def test_the_loop_reads_no_tensor_of_the_device(make_pipeline, scheduler, monkeypatch):
    """On the "meta" device, where reading a value is an error."""
    pipe = make_pipeline(scheduler)
    pipe.scheduler.set_timesteps(6)
    model = pipe.transformer.to("meta")
    pipe.scheduler.timesteps = pipe.scheduler.timesteps.to("meta")
    latents = torch.empty(2, 3, 32, 32, device="meta")
    conditions = {"class_labels": torch.empty(2, dtype=torch.int64, device="meta")}
    monkeypatch.setattr(scheduling_edm, "randn_tensor", lambda shape, **_: torch.empty(shape, device="meta"))
    guidance = Guidance(2.0, (0.1, 5.0), 0.5, {"momentum": -0.5, "norm_threshold": 3.0})
    out = pipe.denoise(latents, conditions, guidance)
    assert out.device.type == "meta" and model.device.type == "meta" and out.shape == latents.shape
    with pytest.raises(RuntimeError):
        out.sum().item()


def test_compiled(make_pipeline):
    """The whole network as one graph (fullgraph), which is what CUDA graphs need; guided and unguided steps."""
    pipe = make_pipeline(depths=(1, 1, 2))
    arguments = {"guidance_scale": 2.0, "guidance_interval": (0.1, 5.0)}
    with reference():  # which a graph has; kernels round in another way, and 20 steps amplify it
        plain = draw(pipe, **arguments)
        pipe.transformer.compile(fullgraph=True, backend="aot_eager")
        assert relative_error(draw(pipe, **arguments), plain) < 1e-4


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_recompilation(make_model, train):
    """Neither for batches of other sizes, once one made the graph symbolic, nor for other noise levels or labels."""
    torch._dynamo.reset()
    model = make_model(num_classes=3, widths=(16, 32), depths=(1, 1), mapping_depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def inputs(batch):
        return torch.randn(batch, 3, 32, 32), torch.randn(batch), torch.randint(4, (batch,))

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    with torch.set_grad_enabled(train):
        compiled(*inputs(2))
        compiled(*inputs(3))
        after_two_sizes = graphs()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (2, 5, 8):
                args = inputs(batch)
                assert relative_error(compiled(*args).sample, model(*args).sample) < 1e-5
        assert graphs() == after_two_sizes > 0


def test_a_compiled_pipeline_does_not_recompile(make_pipeline):
    """Other numbers of steps, seeds, labels and guidance scales at one resolution."""
    pipe = make_pipeline(widths=(16, 32), depths=(1, 1), mapping_depth=1)
    torch._dynamo.reset()
    pipe.transformer.compile(fullgraph=True, backend="aot_eager")

    def sample(label, images, steps, scale):
        generator = torch.Generator().manual_seed(steps)
        pipe(label, images, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="latent")

    sample(0, 2, 2, 1.0)
    sample(1, 3, 2, 2.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        sample(2, 4, 5, 1.0)
        sample(0, 2, 7, 3.0)
