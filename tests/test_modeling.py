import copy
import json
import re
import warnings

import pytest
import torch
from conftest import SMALL, randomize, relative_error
from diffusers import ModelMixin

from diffusers_hdit import HDiTModel
from diffusers_hdit.models.modeling_hdit import (
    HDiTShiftedWindowAttnProcessor,
    axial_positions,
    axial_rotary_frequencies,
    axial_rotary_tables,
)


def inputs(batch=2, channels=3, height=32, width=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, height, width, generator=generator), torch.tensor([-1.0, 0.5, 1.0, 0.1])[
        :batch
    ]


def gradients(model, *args):
    model.zero_grad()
    model(*args).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ATTENTION_TYPES = [
    None,
    ["global", "global", "global"],
    ["shifted_window", "neighborhood", "global"],
    ["none", "shifted_window", "none"],
]


@pytest.mark.parametrize("types", ATTENTION_TYPES)
def test_attention_types_run_and_all_weights_learn(make_model, types):
    model = make_model(attention_types=types, window_size=4, num_classes=3, mapping_cond_dim=2)
    sample, timestep = inputs()
    grads = gradients(model, sample, timestep, torch.tensor([0, 2]), torch.randn(2, 9), torch.randn(2, 2))
    assert set(grads) == {name for name, _ in model.named_parameters()}
    assert all(grad.isfinite().all() and grad.norm() > 0 for grad in grads.values())


def test_starts_at_zero():
    """All residual branches and the last projection are zero-initialised, so F starts at 0."""
    model = HDiTModel(**SMALL)
    assert model(*inputs()).sample.abs().max() == 0


@pytest.mark.parametrize("size", [(32, 32), (24, 64), (56, 24)])
def test_rectangular_sizes(make_model, size):
    sample, timestep = inputs(1, 3, *size)
    assert make_model()(sample, timestep).sample.shape == sample.shape


def test_one_level_channels_and_rectangular_patches():
    model = randomize(
        HDiTModel(
            sample_size=(24, 48), in_channels=12, out_channels=5, patch_size=(2, 4), widths=[32], depths=[2],
            attention_head_dim=8, mapping_width=16, augment_cond_dim=0,
        )
    )  # fmt: skip
    sample, timestep = inputs(2, 12, 24, 48)
    assert model(sample, timestep).sample.shape == (2, 5, 24, 48)


def test_no_label_is_the_last_row(make_model):
    model = make_model(num_classes=3)
    sample, timestep = inputs()
    with torch.no_grad():
        none = model(sample, timestep).sample
        last = model(sample, timestep, torch.tensor([3, 3])).sample
        first = model(sample, timestep, torch.tensor([0, 0])).sample
    assert torch.equal(none, last)
    assert not torch.allclose(none, first)


def test_number_and_scalar_tensor_timesteps(make_model):
    model = make_model()
    sample, _ = inputs()
    with torch.no_grad():
        expected = model(sample, torch.tensor([0.5, 0.5])).sample
        for timestep in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
            assert torch.equal(model(sample, timestep).sample, expected)
        assert torch.equal(model(sample, 0.5, return_dict=False)[0], expected)


def test_positions_and_rotary_tables_in_float64():
    y, x = axial_positions(4, 8, torch.device("cpu"))
    torch.testing.assert_close(x, torch.tensor([-0.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875]))
    torch.testing.assert_close(y, torch.tensor([-0.375, -0.125, 0.125, 0.375]))
    heads, dim = 3, 16
    frequencies = axial_rotary_frequencies(heads, dim).double()
    for j in range(heads * dim // 8):
        expected = torch.pi * 10 ** (j / (heads * dim // 8))
        assert frequencies[j % heads, j // heads].item() == pytest.approx(expected, rel=1e-6)
    cos, sin = axial_rotary_tables(y, x, heads, dim)
    angle = torch.cat((y[2] * frequencies, x[5] * frequencies), dim=-1)
    torch.testing.assert_close(cos[2, 5].double(), angle.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[2, 5].double(), angle.sin(), atol=1e-5, rtol=0)


def test_tables_are_kept_from_call_to_call(make_model):
    model, image = make_model(), torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():  # what is made here must still serve training
        first = model.rotary_tables(8, 8, image)
    assert model.rotary_tables(8, 8, image) is first
    assert not any(table.is_inference() for pair in first for table in pair)
    model.set_position_size(64)
    other = model.rotary_tables(8, 8, image)
    assert not torch.equal(other[0][0], first[0][0])
    assert model.rotary_tables(8, 16, image)[0][0].shape[:2] == (8, 16)
    assert model.rotary_tables(8, 8, image.to("meta"))[0][0].is_meta
    model.set_position_size(None)
    assert model.rotary_tables(8, 8, image) is first


def test_shifted_window_against_a_dense_mask(make_model):
    """Two tokens see each other if they share a window of the rolled grid and were not joined by the roll."""
    h, w, size, shift = 8, 12, 4, 2
    q, k, v = torch.randn(3, 2, h, w, 2, 8, dtype=torch.float64).unbind(0)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rolled = torch.stack(((rows + shift) % h, (columns + shift) % w), -1).reshape(-1, 2)
    wrapped = torch.stack((rows + shift >= h, columns + shift >= w), -1).reshape(-1, 2)
    same_window = (rolled[:, None] // size == rolled[None] // size).all(-1)
    visible = same_window & (wrapped[:, None] == wrapped[None]).all(-1)
    scores = torch.einsum("bqnd,bknd->bnqk", q.flatten(1, 2), k.flatten(1, 2)).masked_fill(~visible, -torch.inf)
    expected = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v.flatten(1, 2)).reshape(q.shape)
    torch.testing.assert_close(HDiTShiftedWindowAttnProcessor(size, shift).attend(q, k, v), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Features of Diffusers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(make_model, tmp_path, dtype):
    model = make_model(num_classes=4, sample_size=(32, 64))
    sample, timestep = inputs(height=32, width=64)
    with torch.no_grad():
        expected = model(sample, timestep).sample
    model.save_pretrained(tmp_path / "float32")
    HDiTModel.from_pretrained(tmp_path / "float32", torch_dtype=dtype).save_pretrained(tmp_path / "again")
    loaded = HDiTModel.from_pretrained(tmp_path / "again", torch_dtype=dtype)
    assert isinstance(loaded, ModelMixin) and loaded.dtype == dtype
    # The fixed random phases keep their precision, in whatever dtype the weights are.
    assert torch.equal(loaded.conditioning.time_proj.weight, model.conditioning.time_proj.weight)
    with torch.no_grad():
        output = loaded(sample, timestep).sample
    assert output.dtype == dtype
    # A few roundings of the dtype's epsilon, amplified by the random network.
    tolerance = 0 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    assert relative_error(output, expected) <= tolerance
    assert loaded.config.sample_size == [32, 64]


def test_float32_statistics_in_bfloat16(make_model):
    """Noise levels that bfloat16 can't tell apart still give different outputs."""
    model = make_model().to(torch.bfloat16)
    sample, _ = inputs()
    assert torch.tensor(1.0).bfloat16() == torch.tensor(1.002).bfloat16()
    with torch.no_grad():
        assert not torch.equal(model(sample, 1.0).sample, model(sample, 1.002).sample)


def test_casting_keeps_the_fourier_phases(make_model):
    model = make_model()
    weight = model.conditioning.time_proj.weight.clone()
    for cast in (lambda: model.to(torch.bfloat16), model.half, lambda: model.to("cpu", torch.float64), model.float):
        cast()
        assert torch.equal(model.conditioning.time_proj.weight, weight)
        assert model.conditioning.time_proj.weight.dtype == torch.float32


def test_autocast_gives_float32_weights_bfloat16_speed_without_warnings(make_model):
    model = make_model()
    sample, timestep = inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(sample, timestep).sample
        with torch.autocast("cpu", torch.bfloat16):
            output = model(sample, timestep).sample
    assert relative_error(output, expected) < 0.1


@pytest.mark.parametrize("types", [ATTENTION_TYPES[0], ATTENTION_TYPES[2]])
def test_gradient_checkpointing_changes_nothing(make_model, types):
    model = make_model(attention_types=types, window_size=4, dropout=0.1).train()
    torch.manual_seed(0)
    expected = gradients(model, *inputs())
    model.enable_gradient_checkpointing()
    torch.manual_seed(0)
    for name, grad in gradients(model, *inputs()).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


# As small as a network with all its layers can be: compiling takes much longer than running.
TWO_LEVELS = {"widths": (16, 32), "depths": (1, 1), "mapping_depth": 1}


@pytest.mark.parametrize(
    ("backend", "types"),
    [
        ("aot_eager", ["neighborhood", "global"]),
        pytest.param("inductor", ["neighborhood", "global"], marks=pytest.mark.slow),
        pytest.param("inductor", ["shifted_window", "none"], marks=pytest.mark.slow),
    ],
)
def test_compile_without_a_graph_break(make_model, backend, types):
    torch._dynamo.reset()
    model = make_model(attention_types=types, window_size=4, num_classes=3, **TWO_LEVELS)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    args = (*inputs(), torch.tensor([0, 2]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(graph break|lru_cache).*")
        # Not ours: old versions of Diffusers look up PyTorch's version in `dispatch_attention_fn`.
        warnings.filterwarnings("ignore", message="(?s).*lru_cache.*attention_dispatch.py")
        assert relative_error(compiled(*args).sample, model(*args).sample) < 1e-5
    expected = gradients(model.train(), *args)
    for name, grad in gradients(compiled, *args).items():
        assert relative_error(grad, expected[name.removeprefix("_orig_mod.")]) < 1e-4, name


@pytest.mark.slow
def test_compiled_model_takes_other_sizes(make_model):
    """The traced graph, with symbolic sizes from the second size on, run operation by operation."""
    torch._dynamo.reset()
    model = make_model(**TWO_LEVELS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((32, 32), (24, 48), (40, 32)):
            args = inputs(2, 3, *size)
            assert relative_error(compiled(*args).sample, model(*args).sample) < 1e-5


@pytest.mark.slow
def test_regional_compile(make_model):
    torch._dynamo.reset()
    model = make_model(**TWO_LEVELS)
    with torch.no_grad():
        expected = model(*inputs()).sample
        model.compile_repeated_blocks(fullgraph=True)
        assert relative_error(model(*inputs()).sample, expected) < 1e-5


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(make_model, level):
    if torch.__version__ < "2.7" and not torch.accelerator.is_available():
        pytest.skip("Diffusers asks this PyTorch for its accelerator, which raises where there is none")
    model = make_model()
    with torch.no_grad():
        expected = model(*inputs()).sample
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=level,
            num_blocks_per_group=1,
        )  # fmt: skip
        assert torch.equal(model(*inputs()).sample, expected)
    hooked = {name for name, module in model.named_modules() if hasattr(module, "_diffusers_hook")}
    if level == "block_level":  # every block on its own, on the way down and up too
        assert {"down_blocks.0.0", "down_blocks.0.1", "up_blocks.1.0", "transformer_blocks.1", "merges.0"} <= hooked


def test_layerwise_casting(make_model):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():  # numbers that float8 has: storing them changes nothing
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
        expected = model(*inputs()).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert torch.equal(model(*inputs()).sample, expected)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert model.transformer_blocks[0].ff.up_proj.weight.dtype == torch.float8_e4m3fn
    assert {"patch_in.proj.weight", "conditioning.time_embedder.weight", "norm_out.weight"} <= kept


def test_lora(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    with torch.no_grad():
        base = model(*inputs()).sample
    tuned = copy.deepcopy(model)
    tuned.add_adapter(
        peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 4 * 8  # A and B of four layers in eight blocks
    grads = gradients(tuned, *inputs())
    assert set(grads) == set(trainable)
    with torch.no_grad():
        adapted = tuned(*inputs()).sample
        assert not torch.allclose(adapted, base)
        tuned.save_lora_adapter(tmp_path)
        tuned.disable_adapters()
        assert torch.equal(tuned(*inputs()).sample, base)
        model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
        assert torch.equal(model(*inputs()).sample, adapted)


def test_neighborhood_backends_agree_and_can_be_changed_any_time(make_model):
    model = make_model()
    with torch.no_grad():
        expected = model(*inputs()).sample
        for backend in ("dense", "tiled", "auto"):
            model.set_neighborhood_backend(backend)
            assert relative_error(model(*inputs()).sample, expected) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (2, 2)}, r"depths has 2 entries, but widths has 3.*\[2, 2\]"),
        ({"kernel_size": [3, 3]}, "kernel_size has 2 entries"),
        ({"attention_types": ["neighborhood", "local", "global"]}, r"attention_types\[1\] is 'local'; allowed are 'neigh"),
        ({"attention_head_dim": 12}, "level 0: attention_head_dim 12 must be a multiple of 8"),
        ({"attention_head_dim": 64}, "must be a multiple of 8 that divides the width 32"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"widths": ()}, "widths is empty"),
        ({"mapping_width": 33}, "mapping_width must be even"),
        ({"sample_size": 36}, "height 36 must be a multiple of 8 .* nearest that works: 32 or 40"),
        ({"sample_size": 8, "kernel_size": 5}, "at least 24.*nearest that works: 24"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_configuration_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        HDiTModel(**{**SMALL, **overrides})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": torch.zeros(2, 3, 32, 36)}, "32×36 images: width 36 must be a multiple of 8.*32 or 40"),
        ({"sample": torch.zeros(2, 1, 32, 32)}, r"sample must have shape \(batch, 3, height, width\), got \(2, 1"),
        ({"class_labels": torch.tensor([0, 4])}, "class_labels must be 0 to 2, or 3 for no label; got values from 0 to 4"),
        ({"class_labels": torch.tensor([0])}, r"class_labels must have shape \(2,\), got \(1,\)"),
        ({"augment_cond": torch.zeros(2, 8)}, r"augment_cond must have shape \(2, 9\)"),
        ({"mapping_cond": torch.zeros(2, 8)}, "mapping_cond was given, but this model has mapping_cond_dim=0. Leave it out"),
    ],
)  # fmt: skip
def test_input_errors(make_model, arguments, message):
    model = make_model(num_classes=3)
    with pytest.raises(ValueError, match=message):
        model(**{"sample": torch.zeros(2, 3, 32, 32), "timestep": 0.0, **arguments})


def test_labels_for_an_unconditional_model(make_model):
    with pytest.raises(ValueError, match="num_classes=None"):
        make_model()(*inputs(), torch.tensor([0, 1]))


def test_the_sizes_named_in_an_error_work(make_model):
    model = make_model(attention_types=["shifted_window", "neighborhood", "global"], window_size=4, kernel_size=5)
    for size in range(1, 80):
        sample, timestep = torch.zeros(1, 3, size, 64), 0.0
        try:
            model.check_size(size, 64)
        except ValueError as error:
            for nearest in re.findall(r"\d+", str(error).split("nearest that works: ")[1]):
                model.check_size(int(nearest), 64)
        else:
            assert model(sample, timestep).sample.shape == sample.shape


def test_backend_that_cannot_work_here(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'natten'"):
        model.set_neighborhood_backend("fast")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="natten"):
            model.set_neighborhood_backend("natten")
        assert model(*inputs()).sample.isfinite().all()


def test_presets_build_the_papers_models():
    from diffusers_hdit import presets

    for name in presets.names():
        with torch.device("meta"):
            model = HDiTModel.from_preset(name, in_channels=4)
        assert model.config.in_channels == 4
        json.dumps(presets.load(name))
    presets.load("tiny")["model"]["widths"].append(1)
    assert presets.load("tiny")["model"]["widths"] == [64, 128, 256]
    with pytest.raises(ValueError, match="there is no preset 'huge'; the presets are 'tiny'"):
        presets.load("huge")


def test_conditioning_channels(make_model):
    """They widen the first matrix only, and stand behind the image's channels in each pixel."""
    model, plain = make_model(conditioning_channels=2), make_model()
    shapes = {name: p.shape for name, p in plain.state_dict().items()}
    other = {name for name, p in model.state_dict().items() if shapes[name] != p.shape}
    assert other == {"patch_in.proj.weight"}
    model.load_state_dict({**plain.state_dict(), **{n: model.state_dict()[n] for n in other}})
    weight = torch.randn(32, 2, 2, 5)
    model.patch_in.proj.weight.data = weight.flatten(1)
    plain.patch_in.proj.weight.data = weight[..., :3].flatten(1)
    sample, condition = torch.randn(2, 3, 32, 32), torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        nothing = model(sample, 0.1, conditioning_image=torch.zeros_like(condition)).sample
        torch.testing.assert_close(nothing, plain(sample, 0.1).sample)
        assert not torch.allclose(model(sample, 0.1, conditioning_image=condition).sample, nothing)
    for given in (None, condition[:1], condition[:, :1]):
        with pytest.raises(ValueError, match=r"conditioning_image must have shape \(2, 2, 32, 32\)"):
            model(sample, 0.1, conditioning_image=given)
    with pytest.raises(ValueError, match="conditioning_image must be left out for this model"):
        plain(sample, 0.1, conditioning_image=condition)
    with pytest.raises(ValueError, match="conditioning_channels must be at least 0, got -1"):
        make_model(conditioning_channels=-1)
