"""Every backend against a loop over queries in float64, forward and backward."""

import os
import shutil
import sys
import threading
import types
import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from diffusers_hdit.ops import cache, neighborhood_backends
from diffusers_hdit.ops.neighborhood_attention import (
    BACKENDS,
    cosine_neighborhood_attention,
    neighborhood_attention,
    unavailable_reason,
)
from diffusers_hdit.ops.registry import kernels_of


public = sys.modules["diffusers_hdit.ops.neighborhood_attention"]  # the package has a function of this name


# Relative error in the 2-norm. Each output sums up to 121 products of rounded numbers: a few units of rounding,
# 6e-8 in float32, 1.1e-16 in float64 and 3.9e-3 in bfloat16 (which also rounds the result and sums gradients in it).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2}

CASES = [  # batch, h, w, heads, channels, kernel
    pytest.param(1, 16, 16, 1, 8, 7, id="tiles"),
    pytest.param(2, 16, 24, 2, 8, 5, id="batch-heads-nonsquare"),
    pytest.param(1, 17, 13, 2, 8, 7, id="odd-sizes"),
    pytest.param(1, 9, 23, 1, 5, (3, 11), id="nonsquare-kernel"),
    pytest.param(1, 5, 6, 1, 8, 3, id="below-the-tile"),
    pytest.param(2, 7, 19, 1, 8, 7, id="kernel-spans-rows"),
    pytest.param(1, 11, 11, 2, 8, 11, id="kernel-spans-grid"),
    pytest.param(1, 20, 10, 1, 4, (17, 1), id="kernel-beyond-the-tile"),
    pytest.param(1, 8, 9, 1, 4, 1, id="kernel-of-one"),
]


def reference(query, key, value, kernel_size, scale):
    """One query at a time, from the definition."""
    b, h, w, n, d = query.shape
    kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    out = []
    for i in range(h):
        top = sorted((0, i - (kh - 1) // 2, h - kh))[1]
        for j in range(w):
            left = sorted((0, j - (kw - 1) // 2, w - kw))[1]
            window_key = key[:, top : top + kh, left : left + kw].reshape(b, kh * kw, n, d)
            window_value = value[:, top : top + kh, left : left + kw].reshape(b, kh * kw, n, d)
            scores = scale * (query[:, i, j, None] * window_key).sum(-1)
            out.append((scores.softmax(1)[..., None] * window_value).sum(1))
    return torch.stack(out, 1).view(b, h, w, n, d)


def tensors(*shape, dtype=torch.float32, requires_grad=False, count=3):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    return [x.requires_grad_(requires_grad) for x in made]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def empty_cache():
    cache._cached.clear()


@pytest.fixture(scope="module")
def flex_on_cpu():
    reason = unavailable_reason("flex", device="cpu", dtype=torch.float32, head_dim=16, training=False)
    if reason is not None:
        pytest.skip(reason)


def skip_without(backend, dtype=torch.float32):
    """Where it cannot be: a kernel that should compile and does not is no reason."""
    missing = sys.platform != "linux" or shutil.which(os.environ.get("CXX") or "g++") is None
    if backend == "cpp" and (missing or dtype == torch.float64):
        pytest.skip("no compiler, or no kernels in float64")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["tiled", "dense", "cpp"])
@pytest.mark.parametrize("b, h, w, n, d, kernel_size", CASES)
def test_values_and_gradients(b, h, w, n, d, kernel_size, backend, dtype):
    skip_without(backend, dtype)
    inputs = tensors(b, h, w, n, d, dtype=dtype, requires_grad=True)
    (weight,) = tensors(b, h, w, n, d, dtype=dtype, count=1)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact, kernel_size, scale=0.7)
    expected_grads = torch.autograd.grad(expected, exact, weight.double())

    out = neighborhood_attention(*inputs, kernel_size, scale=0.7, backend=backend)
    assert out.shape == (b, h, w, n, d) and out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    for found, grad in zip(torch.autograd.grad(out, inputs, weight), expected_grads, strict=True):
        if grad.norm() == 0:  # a window of one key: its weight is 1 whatever the query and key
            assert found.abs().max() <= TOLERANCE[dtype]
        else:
            assert relative_error(found, grad) < TOLERANCE[dtype]


def cosine_inputs(b, h, w, n, d, pairs, dtype=torch.float32):
    """Query, key, value and scale, which need gradients, and angles without the axial ones' regularity."""
    query, key, value = tensors(b, h, w, n, d, dtype=dtype, requires_grad=True)
    scale = torch.linspace(4, 12, n).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    angles = 3 * torch.randn(h, w, n, pairs, dtype=torch.float64, generator=generator) if pairs else None
    return [query, key, value, scale], angles


def cosine_reference(query, key, value, scale, angles, kernel_size):
    """From the definition; channels i and pairs + i are a complex number."""

    def ready(x):
        x = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() * scale.sqrt()[:, None]
        if angles is None:
            return x
        first, second, rest = x.split([*2 * [angles.shape[-1]], x.shape[-1] - 2 * angles.shape[-1]], -1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag, rest), -1)

    return reference(ready(query), ready(key), value, kernel_size, 1.0)


def check_cosine_attention(backend, b, h, w, n, d, pairs, kernel_size, tolerance, dtype=torch.float32):
    inputs, angles = cosine_inputs(b, h, w, n, d, pairs, dtype)
    (weight,) = tensors(b, h, w, n, d, dtype=dtype, count=1)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = cosine_reference(*exact, angles, kernel_size)
    expected_grads = torch.autograd.grad(expected, exact, weight.double())
    rotary = None if angles is None else (angles.cos().float(), angles.sin().float())
    *qkv, scale = inputs
    out = cosine_neighborhood_attention(*qkv, kernel_size, scale, rotary, backend)
    assert out.shape == (b, h, w, n, d) and out.dtype == dtype
    assert relative_error(out, expected) < tolerance
    # What the tokens add to the gradient of the scale nearly cancels out.
    tolerances = [tolerance] * 3 + [5 * tolerance]
    for found, grad, limit in zip(torch.autograd.grad(out, inputs, weight), expected_grads, tolerances, strict=True):
        if grad.norm() == 0:  # a window of one key
            assert found.abs().max() <= tolerance * d
        else:
            assert relative_error(found, grad) < limit


COSINE_CASES = [  # batch, h, w, heads, channels, turned pairs, kernel
    pytest.param(2, 16, 24, 2, 16, 4, 5, id="batch-heads-nonsquare"),
    pytest.param(1, 37, 18, 2, 32, 8, 7, id="several-bands"),
    pytest.param(1, 9, 23, 3, 24, 6, (3, 11), id="channels-filled-up"),
    pytest.param(1, 12, 11, 2, 16, 0, 3, id="no-rotation"),
    pytest.param(1, 9, 11, 1, 16, 8, (9, 11), id="all-channels-turned-whole-grid"),
    pytest.param(1, 8, 9, 2, 8, 2, 1, id="kernel-of-one"),
]


@pytest.mark.parametrize("backend", ["auto", "tiled", "cpp"])
@pytest.mark.parametrize("b, h, w, n, d, pairs, kernel_size", COSINE_CASES)
def test_cosine_attention(b, h, w, n, d, pairs, kernel_size, backend):
    skip_without(backend)
    # Logits of up to 12, whose rounding is that of the weights.
    check_cosine_attention(backend, b, h, w, n, d, pairs, kernel_size, 5e-6)


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
def test_cosine_attention_in_bfloat16(backend):
    skip_without(backend, torch.bfloat16)
    check_cosine_attention(backend, 2, 16, 24, 2, 16, 4, 5, TOLERANCE[torch.bfloat16], torch.bfloat16)


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_cosine_attention_compiled(backend, compiler):
    def step(*inputs, rotary):
        *qkv, scale = inputs
        return cosine_neighborhood_attention(*qkv, 5, scale, rotary, backend).square()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    inputs, angles = cosine_inputs(1, 16, 16, 2, 16, 4)
    rotary = angles.cos().float(), angles.sin().float()
    out, expected = compiled(*inputs, rotary=rotary), step(*inputs, rotary=rotary)
    assert relative_error(out, expected.double()) < 5e-6
    for found, grad in zip(*(torch.autograd.grad(o.sum(), inputs) for o in (out, expected)), strict=True):
        assert relative_error(found, grad.double()) < 5e-6


def test_cosine_attention_refuses_other_shapes():
    (*qkv, scale), angles = cosine_inputs(1, 9, 10, 2, 16, 4)
    with pytest.raises(ValueError, match=r"one number for each of the 2 heads, got shape \(1,\)"):
        cosine_neighborhood_attention(*qkv, 3, scale[:1], None)
    for wrong in (angles[:-1], angles.repeat(1, 1, 1, 3)):
        with pytest.raises(ValueError, match=r"two tensors \(9, 10, 2, c\) with c at most 8, got"):
            cosine_neighborhood_attention(*qkv, 3, scale, (wrong, wrong))


def test_default_scale_and_backend():
    inputs = tensors(1, 9, 9, 1, 16)
    expected = reference(*(x.double() for x in inputs), 3, scale=0.25)
    assert relative_error(neighborhood_attention(*inputs, 3), expected) < TOLERANCE[torch.float32]


# Two shapes: FlexAttention compiles once for each.
@pytest.mark.parametrize("b, h, w, n, d, kernel_size", [CASES[2].values, (2, 20, 24, 1, 32, (3, 11))])
def test_flex(flex_on_cpu, b, h, w, n, d, kernel_size):
    inputs = tensors(b, h, w, n, d, requires_grad=True)
    with torch.no_grad():
        out = neighborhood_attention(*inputs, kernel_size, scale=0.7, backend="flex")
        cache._cached.clear()
        traced = torch.compile(neighborhood_attention, backend="aot_eager", fullgraph=True)
        traced = traced(*inputs, kernel_size, scale=0.7, backend="flex")
        expected = reference(*(x.double() for x in inputs), kernel_size, scale=0.7)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert torch.equal(out, traced)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("b, h, w, n, d, kernel_size", CASES)
def test_flex_mask(b, h, w, n, d, kernel_size, device):
    """The block lists and the mask together allow exactly the windows, for either tile."""
    kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    th, tw = neighborhood_backends._FLEX_TILES[device]
    mask = neighborhood_backends._flex_mask(h, w, kh, kw, th, tw, torch.device("cpu"))
    r, c = -(-h // th), -(-w // tw)
    tokens = torch.arange(r * c * th * tw)
    allowed = mask.mask_mod(0, 0, tokens[:, None], tokens[None])
    assert torch.equal(
        allowed, allowed & mask.to_dense()[0, 0].bool().repeat_interleave(th * tw, 0).repeat_interleave(th * tw, 1)
    )

    converse = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices, BLOCK_SIZE=th * tw)
    assert torch.equal(mask.q_num_blocks, converse.q_num_blocks)
    for count, found, expected in zip(
        mask.q_num_blocks[0, 0], mask.q_indices[0, 0], converse.q_indices[0, 0], strict=True
    ):
        assert torch.equal(found[:count], expected[:count])

    def order(x):
        return x.reshape(r, c, th, tw).permute(0, 2, 1, 3).reshape(r * th, c * tw)[:h, :w].flatten()

    order = order(tokens)
    rows, cols = order.new_tensor(range(h)).repeat_interleave(w), order.new_tensor(range(w)).repeat(h)
    top, left = (rows - kh // 2).clamp(0, h - kh), (cols - kw // 2).clamp(0, w - kw)
    y, x = rows[None] - top[:, None], cols[None] - left[:, None]
    windows = (y >= 0) & (y < kh) & (x >= 0) & (x < kw)
    assert torch.equal(allowed[order][:, order], windows)
    assert allowed[order].sum() == windows.sum(), "padding is visible"


@pytest.mark.parametrize("backend", ["tiled", "dense"])
def test_strided_inputs(backend):
    (packed,) = tensors(2, 10, 12, 3, 2, 8, dtype=torch.float64, count=1)
    packed.requires_grad_()
    inputs = packed.unbind(3)
    transposed = [x.transpose(1, 2) for x in inputs]
    out = neighborhood_attention(*transposed, (5, 3), backend=backend).transpose(1, 2)
    expected = reference(*inputs, (3, 5), scale=8**-0.5)
    assert relative_error(out, expected) < TOLERANCE[torch.float64]
    found, grad = (torch.autograd.grad(o.square().sum(), packed)[0] for o in (out, expected))
    assert relative_error(found, grad) < TOLERANCE[torch.float64]


def test_gradient_checkpointing_after_inference_mode():
    inputs = tensors(1, 10, 9, 2, 8, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():  # tensors that are cached here must still serve training
        neighborhood_attention(*inputs, 5)
    out = neighborhood_attention(*inputs, 5)
    again = torch.utils.checkpoint.checkpoint(neighborhood_attention, *inputs, 5, use_reentrant=False)
    grads, grads_again = (torch.autograd.grad(o.square().sum(), inputs) for o in (out, again))
    assert torch.equal(out, again)
    assert all(torch.equal(x, y) for x, y in zip(grads, grads_again, strict=True))


def training_bytes(h, w, backend):
    """Bytes kept for the backward pass, each storage once, with the cached tensors."""
    cache._cached.clear()
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = neighborhood_attention(*tensors(1, h, w, 1, 16, requires_grad=True), 7, backend=backend)
    for made in cache._cached.values():
        for x in made:
            keep(x)
    assert out.requires_grad  # and alive, so that no address is counted for two storages
    return sum(storages.values())


def test_memory_is_linear_in_tokens():
    # Border halos are as large as inner ones, so the ratio is 4 exactly; the dense mask would make it nearly 16.
    assert training_bytes(64, 64, "tiled") / training_bytes(32, 32, "tiled") == pytest.approx(4, rel=0.02)
    assert training_bytes(64, 64, "dense") / training_bytes(32, 32, "dense") > 10


# Inductor once; the tracer alone shows that a second size keeps one graph, in a fraction of the time.
@pytest.mark.parametrize(
    "compiler, sizes",
    [("inductor", [(16, 16)]), pytest.param("aot_eager", [(16, 16), (20, 27)], marks=pytest.mark.slow)],
)
def test_compiled_equals_eager(compiler, sizes):
    if torch.__version__ < "2.7" and len(sizes) > 1:
        pytest.skip("symbolic sizes in training stop at an assertion of this PyTorch's own; dynamic=False works")

    def step(*inputs):
        return neighborhood_attention(*inputs, 5, backend="tiled").square()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    for h, w in sizes:
        inputs = tensors(1, h, w, 2, 16, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            out = compiled(*inputs)
        expected = step(*inputs)
        assert relative_error(out, expected.double()) < TOLERANCE[torch.float32]
        with torch.no_grad():  # an inference graph is fused in another way
            assert relative_error(compiled(*inputs), expected.double()) < TOLERANCE[torch.float32]
        grads, expected_grads = (torch.autograd.grad(o.sum(), inputs) for o in (out, expected))
        for found, grad in zip(grads, expected_grads, strict=True):
            assert relative_error(found, grad.double()) < TOLERANCE[torch.float32]


def test_cached_tensors_are_reused_and_bounded():
    inputs = tensors(1, 9, 9, 1, 8)
    neighborhood_attention(*inputs, 3, backend="tiled")
    (made,) = cache._cached.values()
    neighborhood_attention(*inputs, 3, backend="tiled")
    assert [x is made for x in cache._cached.values()] == [True]
    for size in range(10, 40):
        neighborhood_attention(*tensors(1, size, 9, 1, 8), 3, backend="tiled")
    assert len(cache._cached) == cache._MAX_CACHED


def test_threads_share_cached_tensors():
    sizes = [(8 + i % 12, 9) for i in range(60)]
    expected = {size: neighborhood_attention(*tensors(1, *size, 1, 8), 3, backend="dense") for size in sizes}
    wrong = []

    def work():
        for size in sizes:
            out = neighborhood_attention(*tensors(1, *size, 1, 8), 3, backend="tiled")
            if not torch.allclose(out, expected[size], atol=1e-5):
                wrong.append(size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache._cached) <= cache._MAX_CACHED


@pytest.mark.parametrize(
    "shape, kernel_size, message",
    [
        ((1, 8, 8, 1, 4), 4, "positive odd integer or a pair of them, got 4"),
        ((1, 8, 8, 1, 4), (3, 6), r"got \(3, 6\)"),
        ((1, 8, 8, 1, 4), (3, 3, 3), r"got \(3, 3, 3\)"),
        ((1, 8, 8, 1, 4), -1, "got -1"),
        ((1, 8, 8, 1, 4), (3.0, 3), r"got \(3.0, 3\)"),
        ((1, 8, 6, 1, 4), 7, r"kernel_size \(7, 7\) is larger than the 8x6 grid"),
        ((1, 8, 8, 4), 3, r"shape \(B, h, w, n, d\), got query \(1, 8, 8, 4\)"),
    ],
)
def test_refuses_bad_sizes(shape, kernel_size, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*tensors(*shape), kernel_size)


def test_refuses_mismatched_shapes():
    query, key, value = tensors(1, 8, 8, 1, 4)
    with pytest.raises(ValueError, match=r"one shape .* value \(1, 8, 7, 1, 4\)"):
        neighborhood_attention(query, key, value[:, :, :7], 3)
    with pytest.raises(ValueError, match=r"one shape .* key \(1, 1, 8, 1, 4\)"):
        neighborhood_attention(query, key[:, :1], value, 3)


def test_refuses_unknown_backend():
    with pytest.raises(ValueError, match="'sparse'; choose 'auto' or one of natten, triton, cpp, tiled, flex, dense"):
        neighborhood_attention(*tensors(1, 8, 8, 1, 4), 3, backend="sparse")


def test_named_natten_is_refused_and_auto_is_tiled(monkeypatch):
    """In float64, for which there are no compiled kernels."""
    inputs = tensors(1, 8, 8, 1, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="'natten' cannot run here: NATTEN's kernels run on CUDA, not on 'cpu'. Use"):
        neighborhood_attention(*inputs, 3, backend="natten")
    monkeypatch.setitem(public._IMPLEMENTATIONS, "tiled", lambda *_: "tiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert neighborhood_attention(*inputs, 3) == "tiled"


def test_flex_refuses_training_on_cpu():
    with pytest.raises(ValueError, match="'flex' cannot run here: FlexAttention has no backward pass on the CPU"):
        neighborhood_attention(*tensors(1, 8, 8, 1, 16, requires_grad=True), 3, backend="flex")


def fake_natten(monkeypatch, version="0.21.7", library=True):
    module = types.ModuleType("natten")
    module.__spec__ = types.SimpleNamespace(name="natten")
    module.__version__, module.HAS_LIBNATTEN = version, library
    monkeypatch.setitem(sys.modules, "natten", module)
    monkeypatch.setattr(neighborhood_backends, "_natten_answer", None)
    return module


GPU = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "training": False}


@pytest.mark.parametrize(
    "backend, situation, library, message",
    [
        ("natten", {}, {}, None),
        ("natten", {"training": True}, {}, None),
        ("natten", {"training": True}, {"version": "0.22.0+torch2130cu130"}, None),
        ("natten", {"training": True}, {"version": "0.21.6.post1"}, "needs NATTEN 0.21.7 or later .*, found 0.21.6"),
        ("natten", {}, {"version": "0.21.6"}, None),
        ("natten", {}, {"library": False}, "without its compiled library"),
        ("natten", {"dtype": torch.float64}, {}, "not in torch.float64"),
        ("natten", {"head_dim": 20}, {}, "multiple of 8, not 20"),
        ("natten", {"kernel_size": (1, 3)}, {}, r"at least 2 tokens along each axis, not \(1, 3\)"),
        ("natten", {"device": "mps"}, {}, "not on 'mps'"),
        ("flex", {"device": "mps"}, {}, "on CPU and CUDA only, not on 'mps'"),
        ("flex", {"dtype": torch.float64}, {}, "not in torch.float64"),
        ("flex", {"head_dim": 8}, {}, "at least 16 channels on CUDA, not 8"),
        ("tiled", {"device": "mps", "dtype": torch.float16, "training": True}, {}, None),
        ("dense", {"device": "cpu", "dtype": torch.float64, "training": True}, {}, None),
    ],
)
def test_unavailable_reason(monkeypatch, backend, situation, library, message):
    fake_natten(monkeypatch, **library)
    reason = unavailable_reason(backend, **{**GPU, **situation})
    if message is None:
        assert reason is None
    else:
        with pytest.raises(ValueError, match=message):
            raise ValueError(reason)
        assert reason.endswith("Use 'auto' or 'tiled' instead.")


def test_missing_natten_is_looked_up_once(monkeypatch):
    monkeypatch.setattr(neighborhood_backends, "_natten_answer", None)
    calls = []
    monkeypatch.setattr(neighborhood_backends.importlib.util, "find_spec", lambda name: calls.append(name))
    for _ in range(3):
        assert "NATTEN is not installed" in unavailable_reason("natten", **GPU)
    assert calls == ["natten"]


def test_flex_names_missing_tools(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = unavailable_reason("flex", device="cpu", dtype=torch.float32, head_dim=16, training=False)
    assert "'no-such-compiler' is missing" in reason or "AVX2" in reason
    monkeypatch.setattr(neighborhood_backends.importlib.util, "find_spec", lambda name: None)
    assert "needs Triton" in unavailable_reason("flex", **GPU)


def test_natten_call(monkeypatch):
    """What NATTEN is called with: contiguous tensors, the pair of sizes, the scale."""

    def na2d(query, key, value, kernel_size, scale):
        assert all(x.is_contiguous() for x in (query, key, value)) and kernel_size == (3, 5)
        return reference(query, key, value, kernel_size, scale)

    fake_natten(monkeypatch).na2d = na2d
    monkeypatch.setattr(public, "natten_problem", lambda *_: None)
    inputs = [x.transpose(1, 2) for x in tensors(1, 10, 8, 1, 8, dtype=torch.float64)]
    out = neighborhood_attention(*inputs, (3, 5), backend="natten")
    assert relative_error(out, reference(*inputs, (3, 5), 8**-0.5)) == 0


def test_backends_are_all_implemented():
    registered = set(kernels_of("neighborhood_attention"))
    assert {*BACKENDS, "whole grid"} == set(public._IMPLEMENTATIONS) | registered
