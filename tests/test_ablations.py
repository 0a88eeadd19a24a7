"""The ablations' design choices: each against a float64 reference, in a model, and saved and loaded."""

import json
import sys
import types

import pytest
import torch
from conftest import SMALL, kept_bytes, randomize, relative_error
from diffusers import EDMDPMSolverMultistepScheduler

from diffusers_hdit import HDiTModel, HDiTPipeline
from diffusers_hdit.evaluation.profiler import profile_model
from diffusers_hdit.models.ablations import (
    AdaLayerNorm,
    HDiTAxialAttnProcessor,
    HDiTSlidingWindowAttnProcessor,
    SplitAndAdd,
    SplitAndConcat,
)
from diffusers_hdit.models.modeling_hdit import HDiTFeedForward
from diffusers_hdit.ops.neighborhood_attention import (
    neighborhood_attention,
    sliding_window_attention,
)
from diffusers_hdit.ops.neighborhood_backends import _axis_halos, centred_start
from diffusers_hdit.ops.registry import reference as kernels_off


AXES = [
    {"attention_types": ["axial", "axial", "global"]},
    {"attention_types": ["sliding_window", "sliding_window", "global"], "kernel_size": [7, 5, 3]},
    {"position_embedding": "additive"},
    {"position_embedding": "none"},
    {"skip": "add"},
    {"skip": "concat"},
    {"activation": "gelu"},
    {"norm": "ada_layer_norm"},
    {"self_conditioning": True},
    {
        "attention_types": ["sliding_window", "none", "axial"],
        "position_embedding": "additive",
        "skip": "concat",
        "activation": "gelu",
        "norm": "ada_layer_norm",
        "self_conditioning": True,
    },
]


def inputs(height=32, width=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator), torch.tensor([-1.0, 0.5])


def attention_inputs(height, width, dtype):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, height, width, 2, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def value_and_gradients(function, query, key, value, gradient):
    tensors = [x.clone().requires_grad_() for x in (query, key, value)]
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, gradient)


def masked_attention(query, key, value, sees):
    """`sees (h, w, h, w)`, query first; one softmax over all keys, written out."""
    scores = torch.einsum("bijnd,bklnd->bnijkl", query, key).masked_fill(~sees, float("-inf"))
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    return torch.einsum("bnijkl,bklnd->bijnd", weights, value)


def window(height, width, kernel_height, kernel_width):
    def near(length, kernel):
        index = torch.arange(length)
        return (index[:, None] - index).abs() <= kernel // 2

    return near(height, kernel_height)[:, None, :, None] & near(width, kernel_width)[None, :, None, :]


# ----------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize(
    ("grid", "kernel"),
    [
        ((5, 7), (3, 3)),
        ((9, 17), (7, 7)),
        ((20, 3), (5, 1)),
        ((16, 24), (3, 7)),
        ((4, 4), (9, 9)),
        ((19, 18), (13, 5)),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_sliding_window_against_dense_float64(grid, kernel, dtype, tolerance):
    """Tolerances: some rounding errors of the dtype, summed over at most 81 keys and the gradients of that many queries."""
    found = value_and_gradients(
        lambda q, k, v: sliding_window_attention(q, k, v, kernel, scale=1.0), *attention_inputs(*grid, dtype)
    )
    expected = value_and_gradients(
        lambda q, k, v: masked_attention(q, k, v, window(*grid, *kernel)),
        *(x.double() for x in attention_inputs(*grid, dtype)),
    )
    for value, reference in zip(found, expected, strict=True):
        assert value.isfinite().all() and relative_error(value, reference) < tolerance


def test_no_query_sees_nothing():
    """Those that fill up the last tile neither: some kernels give NaN for a softmax over no keys."""
    for length, kernel in ((9, 3), (17, 7), (8, 1)):
        _, sees = _axis_halos(length, kernel, 8, torch.device("cpu"), centred_start)
        assert sees.any(-1).all()


def test_sliding_window_is_the_neighborhood_away_from_borders_only():
    query, key, value, _ = attention_inputs(12, 12, torch.float64)
    difference = sliding_window_attention(query, key, value, 5) - neighborhood_attention(query, key, value, 5)
    assert difference[:, 2:-2, 2:-2].abs().max() < 1e-13
    assert difference[:, :2].abs().max() > 0.1 and difference[:, :, -2:].abs().max() > 0.1


def test_sliding_window_says_what_does_not_fit():
    query, key, value, _ = attention_inputs(4, 4, torch.float32)
    with pytest.raises(ValueError, match="positive odd integer"):
        sliding_window_attention(query, key, value, 4)
    with pytest.raises(ValueError, match="one shape"):
        sliding_window_attention(query, key[:, :2], value, 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_axial_against_dense_float64(dtype, tolerance):
    """The product of two masked attentions over the whole grid: first a token's row, then its column."""
    grid = (5, 7)
    same_row = torch.eye(5, dtype=torch.bool)[:, None, :, None].expand(5, 7, 5, 7)
    same_column = torch.eye(7, dtype=torch.bool)[None, :, None, :].expand(5, 7, 5, 7)

    def reference(query, key, value):
        return masked_attention(query, key, masked_attention(query, key, value, same_row), same_column)

    found = value_and_gradients(HDiTAxialAttnProcessor().attend, *attention_inputs(*grid, dtype))
    expected = value_and_gradients(reference, *(x.double() for x in attention_inputs(*grid, dtype)))
    for value, target in zip(found, expected, strict=True):
        assert relative_error(value, target) < tolerance


# ----------------------------------------------------------------------------------------------------------------------
# Other design choices


def test_no_position_embedding_knows_no_positions():
    """With global attention, moved patches come out moved; rotary and additive positions change them."""
    config = {**SMALL, "widths": [32], "depths": [2], "attention_types": ["global"]}
    sample, timestep = inputs(8, 8)
    permutation = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def move(image):
        patches = image.unflatten(3, (4, 2)).unflatten(2, (4, 2)).transpose(3, 4).flatten(2, 3)[:, :, permutation]
        return patches.unflatten(2, (4, 4)).transpose(3, 4).flatten(4, 5).flatten(2, 3)

    errors = {}
    for choice in ("none", "rope", "additive"):
        model = randomize(HDiTModel(**{**config, "sample_size": 8, "position_embedding": choice})).double()
        with torch.no_grad():
            first, second = (model(x.double(), timestep).sample for x in (sample, move(sample)))
        errors[choice] = relative_error(second, move(first))
    assert errors["none"] < 1e-6 and errors["rope"] > 1e-3 and errors["additive"] > 1e-3, errors


def test_additive_positions_are_resampled_for_other_sizes():
    model = HDiTModel(**SMALL, position_embedding="additive")
    patch_in = model.patch_in
    assert patch_in.positions.shape == (1, 16, 16, 32)
    image = torch.randn(1, 32, 32, 3)
    with torch.no_grad():
        torch.testing.assert_close(patch_in(image), patch_in.merge(image) + patch_in.positions)
        # Linear resampling keeps a ramp a ramp: token centres (i + 1/2) / 16, but for the two ends.
        patch_in.positions.copy_(((torch.arange(16) + 0.5) / 16).view(1, 1, 16, 1).expand(1, 16, 16, 32))
        wide = torch.zeros(1, 24, 64, 3)
        ramp = patch_in(wide)[0, :, 1:-1]
    expected = ((torch.arange(32) + 0.5) / 32)[1:-1].view(1, 30, 1).expand(12, 30, 32)
    torch.testing.assert_close(ramp, expected)


def test_gelu_and_layer_norm_against_float64():
    torch.manual_seed(0)
    x, temb = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    feed_forward = randomize(HDiTFeedForward(8, 12, activation="gelu")).double()
    hidden = x @ feed_forward.up_proj.weight.T
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(feed_forward(x), gelu @ feed_forward.down_proj.weight.T)

    norm = AdaLayerNorm(8, 6).double()
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    plain = (x - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(norm(x, temb), plain)
    randomize(norm)
    scale, shift = (temb @ norm.linear.weight.T).view(2, 1, 1, 16).split(8, dim=-1)
    torch.testing.assert_close(norm(x, temb), plain * (1 + scale) + shift)


def test_skips_add_and_concatenate():
    x, skip = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8)
    split = torch.nn.Linear(8, 8)
    torch.testing.assert_close(SplitAndAdd(split, 8)(x, skip), split(x) + skip)
    concat = SplitAndConcat(split, 8)
    left, right = concat.mix.weight.split(8, dim=1)
    torch.testing.assert_close(concat(x, skip), skip @ left.T + split(x) @ right.T)


# ----------------------------------------------------------------------------------------------------------------------
# In a model


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_shape_and_gradients(make_model, axis):
    model = make_model(**axis)
    for size in ((32, 32), (24, 64)):
        sample, timestep = inputs(*size)
        model.zero_grad()
        output = model(sample, timestep).sample
        assert output.shape == sample.shape
        output.square().mean().backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            assert grad is not None and grad.isfinite().all() and grad.norm() > 0, name


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_saved_and_loaded(make_model, tmp_path, axis):
    model = make_model(**axis)
    model.save_pretrained(tmp_path)
    loaded = HDiTModel.from_pretrained(tmp_path)
    for name, value in axis.items():
        assert loaded.config[name] == value
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_bfloat16_loses_about_what_it_loses_with_the_papers_choices(make_model, axis):
    errors = []
    for config in ({}, axis):
        torch.manual_seed(0)
        model = make_model(**config)
        with torch.no_grad():
            exact = model(*inputs()).sample
            output = model.to(torch.bfloat16)(*inputs()).sample
        assert output.dtype == torch.bfloat16
        errors.append(relative_error(output, exact))
    assert errors[1] < 2 * errors[0], errors


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_starts_at_zero(axis):
    assert HDiTModel(**{**SMALL, **axis})(*inputs()).sample.abs().max() == 0


@pytest.mark.parametrize("axis", [axis for axis in AXES[:4] if axis != {"position_embedding": "additive"}], ids=str)
def test_differs_from_the_papers_with_the_same_weights(make_model, axis):
    papers, model = make_model(), make_model(**axis)
    model.load_state_dict(papers.state_dict())
    with torch.no_grad():
        assert relative_error(model(*inputs()).sample, papers(*inputs()).sample) > 1e-3


def test_carried_code_runs_without_the_package(make_model, tmp_path):
    """The file that a saved model carries has the ablations too."""
    model = make_model(**AXES[-1])
    model.save_pretrained(tmp_path)
    module = sys.modules["carried"] = types.ModuleType("carried")
    try:
        exec(compile((tmp_path / "modeling_hdit.py").read_text(), "carried", "exec"), vars(module))
        carried = module.HDiTModel(**{**SMALL, **AXES[-1]})
        carried.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(carried(*inputs()).sample, model(*inputs()).sample)
    finally:
        del sys.modules["carried"]


def test_a_configuration_of_before_is_the_papers(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("position_embedding", "skip", "activation", "norm", "self_conditioning"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(HDiTModel.from_pretrained(tmp_path)(*inputs()).sample, model(*inputs()).sample)


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_gradient_checkpointing_changes_nothing(make_model, axis):
    gradients = []
    model = make_model(**axis).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(*inputs()).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_compile_without_a_graph_break(make_model):
    """As in test_modeling, for a network of all the other design choices."""
    torch._dynamo.reset()
    axis = {**AXES[-1], "attention_types": ["sliding_window", "axial"]}
    model = make_model(widths=(16, 32), depths=(1, 1), mapping_depth=1, **axis)
    results = []
    for network in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        output = network(*inputs()).sample
        output.square().mean().backward()
        results.append([output, *(parameter.grad for parameter in model.parameters())])
    for expected, found in zip(*results, strict=True):
        # Compiled kernels add in another order.
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"position_embedding": "sine"}, "position_embedding is 'sine'; allowed are 'rope', 'additive', 'none'"),
        ({"skip": "none"}, "skip is 'none'; allowed are"),
        ({"activation": "relu"}, "activation is 'relu'; allowed are"),
        ({"norm": ["ada_rms_norm"] * 3}, "norm is .* allowed are"),
        ({"attention_types": ["sliding_window", "axial", "rows"]}, r"attention_types\[2\] is 'rows'; allowed are"),
        ({"attention_types": "sliding_window", "kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"self_conditioning": "yes"}, "self_conditioning is 'yes'; allowed are False, True"),
        ({"self_conditioning": True, "out_channels": 6}, "in_channels=3, out_channels=6. Leave out_channels out"),
        ({"widths": [32], "depths": [1], "skip": "concat"}, "one level has no skips"),
        ({"attention_types": "none", "position_embedding": "none"}, "no level of this model has attention"),
    ],
)
def test_combinations_that_make_no_sense(config, message):
    with pytest.raises(ValueError, match=message):
        HDiTModel(**{**SMALL, **config})


# ----------------------------------------------------------------------------------------------------------------------
# What reads a model


@pytest.mark.parametrize("axis", [axis for axis in AXES if "sliding_window" not in str(axis)], ids=str)
def test_profile_against_pytorchs_own_counter(axis):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = {**SMALL, "attention_types": ["axial", "global", "none"], **axis}
    if axis.get("position_embedding"):
        config["attention_types"] = ["axial", "global", "global"]
    model = HDiTModel(**config)
    profile = profile_model(config)
    assert profile.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 32, 32), 0.0)
    assert profile.macs == counter.get_total_flops() / 2


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_profile_of_activation_memory_is_what_autograd_keeps(axis):
    # A small kernel: blocks share the mask of their tiles, which a profile counts for each of them.
    config = {**SMALL, **axis, "kernel_size": 3}
    model = HDiTModel(**config).bfloat16()
    model.set_neighborhood_backend("tiled")
    with kernels_off():
        assert profile_model(config).activation_bytes == pytest.approx(kept_bytes(model), rel=0.1)


@pytest.mark.parametrize(("grid", "kernel"), [((5, 9), 3), ((4, 4), 9), ((8, 6), 7)])
def test_pairs_of_the_sliding_window(grid, kernel):
    assert HDiTSlidingWindowAttnProcessor(kernel).query_key_pairs(*grid) == window(*grid, kernel, kernel).sum()


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_the_reference_has_no_such_network(make_model, tmp_path, axis):
    pipe = HDiTPipeline(make_model(**axis), EDMDPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="it does not know"):
        pipe.save_k_diffusion(tmp_path / "checkpoint.safetensors")
    assert not list(tmp_path.iterdir())
