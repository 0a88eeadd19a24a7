"""The Triton kernels: interpreted on the CPU in a process of their own, compiled for a GPU that need not be there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffusers_hdit.ops.triton
from diffusers_hdit import presets
from diffusers_hdit.ops import kernels
from diffusers_hdit.ops.neighborhood_attention import neighborhood_attention, unavailable_reason


GPU = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "training": True}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: pip install --no-deps triton==3.7.1 (200 MB; no GPU needed)",
)


@needs_triton
def test_in_tritons_interpreter():
    import numpy
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 does not work with NumPy 2.4 (triton-lang/triton#9171)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted_neighborhood_triton.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "skipped" not in result.stdout.splitlines()[-1], result.stdout[-6000:]


KERNELS = ("_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel")


def compile_kernel(name, dtype, head_dim, kernel_size, pairs, capability):
    """What Triton's compiler makes for an NVIDIA GPU of this capability; pointers and strides as they usually are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from diffusers_hdit.ops.triton import neighborhood_attention as neighborhood_triton

    function = getattr(neighborhood_triton, name)
    options = neighborhood_triton.launch_options(dtype, head_dim)
    constants = {"KH": kernel_size, "KW": kernel_size, "D": head_dim, "BH": options.pop("BH"), "BW": options.pop("BW")}
    constants["TH"], constants["TW"] = neighborhood_triton._TILE
    constants |= neighborhood_triton.part_sizes(head_dim, pairs)
    types = {"scale": "fp32", **dict.fromkeys(("lse", "delta", "norm", "cos", "sin", "shares"), "*fp32")}
    types |= dict.fromkeys(("h", "w", "heads"), "i32")
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    signature, attributes = {}, {}
    for i, argument in enumerate(function.arg_names):
        is_stride = re.fullmatch("[a-z][byxn]", argument)
        kind = "constexpr" if argument in constants else types.get(argument, "i32" if is_stride else pointer)
        signature[argument] = kind
        if is_stride or kind.startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, tmp_path):
    """Registers of a thread and bytes of registers spilled, as ptxas reports them, and bytes of shared memory."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptx = compiled.asm["ptx"]
    (tmp_path / "kernel.ptx").write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, flags=re.MULTILINE)[1]
    command = [ptxas, "-v", "--gpu-name", target, tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return registers, int(re.search(r"(\d+) bytes spill stores", report)[1]), compiled.metadata.shared


def situations():
    """
    Every head and window of a neighborhood level in the presets, and the other heads that the kernels take; with pairs that
    are turned, as in the model, and with nothing to be done.
    """
    found = {(32, 7), (64, 7), (128, 7)}
    for name in presets.names():
        model = {"attention_head_dim": 64, "kernel_size": 7, **presets.load(name)["model"]}
        found.add((model["attention_head_dim"], model["kernel_size"]))
    return [(head_dim, size, pairs) for head_dim, size in sorted(found) for pairs in (head_dim // 4, -1)]


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_dim, kernel_size, pairs", [*situations(), (64, 7, 0)])
def test_compiles_for_sm_90(name, head_dim, kernel_size, pairs, tmp_path):
    compiled = compile_kernel(name, torch.bfloat16, head_dim, kernel_size, pairs, 90)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert "wgmma.mma_async" in compiled.asm["ptx"]  # Hopper's matrix unit, fed from shared memory
    registers, spilled, shared = resources(compiled, tmp_path)
    situation = f"{name}, bfloat16, d={head_dim}, k={kernel_size}, {pairs} pairs"
    print(f"{situation}: {registers} registers, {spilled} B spilled, {shared} B shared")
    assert spilled == 0
    assert shared <= 99 * 1024  # what a program may have on consumer cards; 227 KiB on an H200


@needs_triton
@pytest.mark.parametrize("pairs", [16, -1])
@pytest.mark.parametrize("dtype, capability", [(torch.float32, 90), (torch.float16, 80)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_others(name, dtype, capability, pairs, tmp_path):
    compiled = compile_kernel(name, dtype, 64, 7, pairs, capability)
    registers, spilled, shared = resources(compiled, tmp_path)
    print(
        f"{name}, {dtype}, sm_{capability}, {pairs} pairs: {registers} registers, {spilled} B spilled, {shared} B shared"
    )
    # On an A100, the gradients of keys that are to be turned want some 26 registers more than there are.
    assert spilled <= (128 if capability == 80 and pairs > 0 else 0) and shared <= 99 * 1024


@pytest.mark.parametrize(
    "situation, message",
    [
        ({"device": "mps"}, "run on CUDA, not on 'mps'"),
        ({"dtype": torch.float64}, "float32, float16 or bfloat16, not in torch.float64"),
        ({"head_dim": 48}, "heads of 16, 32, 64 or 128 channels, not 48"),
        ({"device": "cpu"}, "run on CUDA, not on 'cpu'|Triton is not installed"),
    ],
)
def test_refusals(situation, message):
    with pytest.raises(ValueError, match=message):
        raise ValueError(unavailable_reason("triton", **{**GPU, **situation}))


def test_refused_on_the_cpu():
    query = torch.zeros(1, 8, 8, 1, 16)
    with pytest.raises(ValueError, match="'triton' cannot run here: .* Use 'auto' or 'tiled' instead."):
        neighborhood_attention(query, query, query, 3, backend="triton")


@needs_triton
def test_runs_on_cuda():
    assert unavailable_reason("triton", **GPU) is None


def test_missing_triton_is_looked_up_once(monkeypatch):
    monkeypatch.setattr(kernels, "_triton", None)
    calls = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: calls.append(name))
    for _ in range(3):
        assert "Triton is not installed" in unavailable_reason("triton", **GPU)
    assert calls == ["triton"]


def test_kernels_that_do_not_import(monkeypatch):
    """A broken Triton."""
    monkeypatch.setattr(kernels, "_triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "diffusers_hdit.ops.triton.neighborhood_attention", None)
    monkeypatch.delattr(diffusers_hdit.ops.triton, "neighborhood_attention", raising=False)
    assert "do not import (" in unavailable_reason("triton", **GPU)
