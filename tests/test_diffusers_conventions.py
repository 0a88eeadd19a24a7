"""Diffusers' conventions on HDiTModel: attention processors and backends, fused projections, caches, safe weights."""

import copy
import pickle

import pytest
import torch
from conftest import SMALL, relative_error
from diffusers import EDMDPMSolverMultistepScheduler, PyramidAttentionBroadcastConfig
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_hdit import HDiTModel, HDiTPipeline, UNetPixelModel
from diffusers_hdit.models.modeling_hdit import (
    ATTENTION_PROCESSORS,
    HDiTAttention,
    HDiTAttnProcessor,
    HDiTNeighborhoodAttnProcessor,
    HDiTShiftedWindowAttnProcessor,
)


TYPES = ["neighborhood", "shifted_window", "global"]


def inputs(seed=1):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), torch.tensor([-1.0, 0.5])


@torch.no_grad()
def output(model, *args):
    return model(*(args or inputs())).sample


def count(modules):
    """Count how often these modules' own code runs, below Diffusers' hooks."""
    runs = [0]
    for module in modules:
        module.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Attention processors


def test_every_attention_type_has_its_processor(make_model):
    model = make_model(attention_types=TYPES, window_size=4)
    modules = [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]
    processors = model.attn_processors
    assert len(processors) == len(modules) == 8 and all(isinstance(module, HDiTAttention) for module in modules)
    assert type(processors["down_blocks.0.0.attn.processor"]) is HDiTNeighborhoodAttnProcessor
    assert type(processors["down_blocks.1.0.attn.processor"]) is HDiTShiftedWindowAttnProcessor
    assert type(processors["transformer_blocks.1.attn.processor"]) is HDiTAttnProcessor
    # The first block of the down path is not shifted, the second one of its level, on the up path, is.
    shifts = [processors[f"{path}_blocks.1.0.attn.processor"].shift for path in ("down", "up")]
    assert shifts == [0, 2]
    assert not any("processor" in name for name in model.state_dict()), "processors have no weights"


def test_all_registered_processors_are_available():
    level = HDiTModel(**SMALL).levels[0]
    made = [make(level, 0) for make in ATTENTION_PROCESSORS.values() if make is not None]
    assert {type(processor) for processor in made} == set(HDiTAttention._available_processors)
    assert all(processor.query_key_pairs(8, 8) > 0 for processor in made)


def test_processors_can_be_exchanged(make_model):
    model, everywhere = make_model(attention_types=TYPES, window_size=4), make_model(attention_types="global")
    everywhere.load_state_dict(model.state_dict())
    expected, original = output(model), model.attn_processors
    model.set_attn_processor(HDiTAttnProcessor())
    assert torch.equal(output(model), output(everywhere)), "the weights are the same, and now the attention is too"
    model.set_attn_processor(dict(original))
    assert torch.equal(output(model), expected)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({"down_blocks.0.0.attn.processor": HDiTAttnProcessor()})


def test_a_processor_of_ones_own(make_model):
    class Nothing:
        def __call__(self, attn, hidden_states, image_rotary_emb=None):
            return torch.zeros_like(hidden_states)

    model, without = make_model(), make_model(attention_types="none")
    without.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(output(model), output(without))
    model.set_attn_processor(Nothing())
    assert torch.equal(output(model), output(without))


def test_processors_are_copied_pickled_and_not_saved(make_model, tmp_path):
    model = make_model(attention_types=TYPES, window_size=4, activation="gelu")
    model.set_neighborhood_backend("dense")
    expected = output(model)
    twin = copy.deepcopy(model)
    for other in (twin, pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), expected)
        assert other.attn_processors["down_blocks.0.0.attn.processor"].backend == "dense"
    twin.set_neighborhood_backend("tiled")
    assert model.attn_processors["down_blocks.0.0.attn.processor"].backend == "dense"
    model.save_pretrained(tmp_path)
    loaded = HDiTModel.from_pretrained(tmp_path)
    assert loaded.attn_processors["down_blocks.0.0.attn.processor"].backend == "auto"
    assert relative_error(output(loaded), expected) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Attention backends


class Operators(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture
def keep_active_backend():
    """`set_attention_backend` changes the backend of the whole process too; put it back."""
    with attention_backend(AttentionBackendName.NATIVE):
        yield


def operators(model):
    with Operators() as recorded:
        found = output(model)
    return found, recorded.names


@pytest.mark.parametrize("types", ["global", "axial"])
def test_attention_backends_reach_the_attention(make_model, keep_active_backend, types):
    model = make_model(attention_types=types)
    expected, names = operators(model)
    assert FUSED in names
    with attention_backend("_native_math"):
        found, names = operators(model)
        assert FUSED not in names and relative_error(found, expected) < 1e-5
    model.set_attention_backend("_native_math")
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {"_native_math"}
    with attention_backend("native"):  # the model's own choice goes before the context's
        chosen, names = operators(model)
    assert FUSED not in names and torch.equal(chosen, found)
    model.set_attention_backend("native")
    assert torch.equal(output(model), expected)
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}
    with pytest.raises(ValueError, match="must be one of the following"):
        model.set_attention_backend("fastest")


def test_neighborhoods_keep_their_own_backend(make_model, keep_active_backend):
    """Attention backends of Diffusers know no neighborhoods."""
    model = make_model(attention_types=["neighborhood", "neighborhood", "none"])
    model.set_neighborhood_backend("dense")
    expected = output(model)
    model.set_attention_backend("_native_math")
    assert torch.equal(output(model), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Fused projections


@pytest.mark.parametrize("types", [TYPES, ["sliding_window", "axial", "global"]])
def test_fused_projections(make_model, types):
    model = make_model(attention_types=types, window_size=4)
    expected, keys = output(model), list(model.state_dict())
    single = count([module.to_q for module in model.modules() if isinstance(module, HDiTAttention)])
    model.fuse_qkv_projections()
    fused = count([module.to_qkv for module in model.modules() if isinstance(module, HDiTAttention)])
    assert relative_error(output(model), expected) < 1e-5
    assert (single[0], fused[0]) == (0, 8)
    model.unfuse_qkv_projections()
    assert torch.equal(output(model), expected) and list(model.state_dict()) == keys


# ----------------------------------------------------------------------------------------------------------------------
# Caches


def pyramid(timestep_range=(-2.0, 2.0)):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=timestep_range,
        current_timestep_callback=lambda: 0.0,
    )


def hooks(model, name):
    found = [module._diffusers_hook.get_hook(name) for module in model.modules() if hasattr(module, "_diffusers_hook")]
    return sum(hook is not None for hook in found)


def test_pyramid_attention_broadcast_finds_all_attention(make_model):
    model = make_model()
    model.enable_cache(pyramid())
    assert model.is_cache_enabled and hooks(model, "pyramid_attention_broadcast") == 8
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(pyramid())
    model.disable_cache()
    assert not model.is_cache_enabled and hooks(model, "pyramid_attention_broadcast") == 0


def test_pyramid_attention_broadcast_reuses_attention(make_model):
    model = make_model(depths=(1, 1, 1))
    first, second = inputs(1), inputs(2)
    plain = [output(model, *args) for args in (first, second)]
    runs = count(module.to_q for module in model.modules() if isinstance(module, HDiTAttention))
    model.enable_cache(pyramid())
    with model.cache_context("a"):
        assert torch.equal(output(model, *first), plain[0]) and runs[0] == 5
        cached = output(model, *second)
        assert runs[0] == 5 and cached.isfinite().all() and not torch.allclose(cached, plain[1], atol=1e-5)
        assert torch.equal(output(model, *second), plain[1]) and runs[0] == 10, "every second step is computed"
    model._reset_stateful_cache()
    with model.cache_context("a"):
        assert torch.equal(output(model, *second), plain[1])
    model.disable_cache()
    model.enable_cache(pyramid((1.0, 2.0)))
    for args, expected in zip((first, second), plain, strict=True):
        assert torch.equal(output(model, *args), expected), "this timestep is out of the range"


def test_pyramid_attention_broadcast_with_batches_of_several_sizes(make_model):
    """Guided steps evaluate two batches at once, and must not reuse the attention of the steps before."""
    pipe = HDiTPipeline(make_model(num_classes=3, depths=(1, 1, 2)), EDMDPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_cache(pyramid())

    def generate():
        generator = torch.Generator().manual_seed(0)
        arguments = {"guidance_scale": 2.0, "guidance_interval": (0.1, 5.0), "output_type": "latent"}
        return pipe(1, num_inference_steps=8, generator=generator, **arguments).images

    first = generate()
    assert first.shape == (1, 3, 32, 32) and torch.equal(generate(), first)
    with pipe.transformer.cache_context("one"):
        single = output(pipe.transformer, *(x[:1] for x in inputs()))
    with pipe.transformer.cache_context("both"):
        both = output(pipe.transformer)
    pipe.transformer.disable_cache()
    assert torch.equal(both, output(pipe.transformer)) and len(single) == 1


def test_first_block_cache_skips_the_rest_of_the_middle(make_model):
    model = make_model(depths=(1, 1, 3))
    first, second = inputs(1), inputs(2)
    plain = [output(model, *args) for args in (first, second)]
    runs = count(block.ff for block in model.transformer_blocks[1:])
    model.enable_cache(FirstBlockCacheConfig(threshold=1e3))
    assert hooks(model, "fbc_leader_block_hook") == 1 and hooks(model, "fbc_block_hook") == 2
    with model.cache_context("a"):
        assert torch.equal(output(model, *first), plain[0]) and runs[0] == 2
        cached = output(model, *second)
        assert runs[0] == 2 and cached.isfinite().all() and not torch.allclose(cached, plain[1], atol=1e-5)
    model.disable_cache()
    assert hooks(model, "fbc_leader_block_hook") == hooks(model, "fbc_block_hook") == 0
    assert torch.equal(output(model, *second), plain[1])


# ----------------------------------------------------------------------------------------------------------------------
# Weights are never pickled


def saved_things(make_model):
    unet = {"sample_size": 16, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    return {
        "model": make_model(),
        "model in bfloat16": make_model().bfloat16(),
        "pipeline": HDiTPipeline(make_model(), EDMDPMSolverMultistepScheduler()),
        "baseline": UNetPixelModel(**unet),
    }


@pytest.mark.parametrize("arguments", [{}, {"variant": "fp16"}, {"max_shard_size": "100KB"}], ids=str)
@pytest.mark.parametrize("what", ["model", "model in bfloat16", "pipeline", "baseline"])
def test_weights_that_could_not_be_loaded_are_not_saved(make_model, tmp_path, what, arguments):
    saved = saved_things(make_model)[what]
    with pytest.raises(ValueError, match=f"{type(saved).__name__} saves weights as safetensors only.*Leave it out"):
        saved.save_pretrained(tmp_path / "folder", safe_serialization=False, **arguments)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("arguments", [{"variant": "fp16"}, {"max_shard_size": "100KB"}], ids=str)
def test_a_pipeline_hands_on_how_weights_are_saved(make_model, tmp_path, arguments):
    pipe = HDiTPipeline(make_model(), EDMDPMSolverMultistepScheduler())
    pipe.save_pretrained(tmp_path, **arguments)
    names = {path.name for path in (tmp_path / "transformer").glob("*.safetensors")}
    if "variant" in arguments:
        assert names == {"diffusion_pytorch_model.fp16.safetensors"}
    else:
        assert len(names) > 1
    variant = {name: value for name, value in arguments.items() if name == "variant"}
    loaded = HDiTPipeline.from_pretrained(tmp_path, **variant)
    assert torch.equal(output(loaded.transformer), output(pipe.transformer))
