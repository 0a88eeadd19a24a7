"""The library of C++ kernels: compiled once, kept where nobody else writes, and what happens without it."""

import os
import subprocess
import sys

import pytest
import torch
from test_neighborhood import skip_without, tensors

from diffusers_hdit.ops.cpu import library as cpp_kernels
from diffusers_hdit.ops.neighborhood_attention import neighborhood_attention, unavailable_reason


CPU = {"device": "cpu", "dtype": torch.float32, "head_dim": 16, "training": True}


@pytest.fixture(autouse=True)
def cpp():
    skip_without("cpp")


def test_compiled_once_and_kept(no_kernels_yet, monkeypatch):
    assert unavailable_reason("cpp", **CPU) is None
    (library,) = no_kernels_yet.iterdir()
    monkeypatch.setattr(subprocess, "run", None)
    assert cpp_kernels.library_path() == library
    assert no_kernels_yet.stat().st_mode & 0o077 == 0
    no_kernels_yet.chmod(0o777)
    assert cpp_kernels._folders()[0] == no_kernels_yet
    with pytest.raises(PermissionError, match="others than this user may write to it"):
        cpp_kernels._find_or_compile("g++", [], no_kernels_yet, library.name)


def test_without_a_compiler(no_kernels_yet, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    inputs = tensors(1, 9, 9, 1, 16)
    message = "'cpp' cannot run here: its kernels need a C\\+\\+ compiler, and 'no-such-compiler' is missing"
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*inputs, 3, backend="cpp")
    assert torch.equal(neighborhood_attention(*inputs, 3), neighborhood_attention(*inputs, 3, backend="tiled"))


def test_a_compiler_that_fails(no_kernels_yet, monkeypatch):
    monkeypatch.setattr(cpp_kernels, "_FLAGS", (*cpp_kernels._FLAGS, "-std=nonsense"))
    assert "its kernels do not compile: " in unavailable_reason("cpp", **CPU)
    assert not list(no_kernels_yet.iterdir()), "nothing unfinished is left"
    assert neighborhood_attention(*tensors(1, 9, 9, 1, 16), 3).isfinite().all()


def test_a_home_that_cannot_be_written_to(no_kernels_yet, tmp_path):
    no_kernels_yet.write_text("a file")
    assert cpp_kernels.library_path().parent == tmp_path / f"diffusers_hdit-{os.getuid()}"


COUNTING_COMPILER = """#!/bin/sh
echo once >> {log}
sleep 1
exec g++ "$@"
"""
USE_KERNELS = "from diffusers_hdit.ops.cpu import library; print(library.library() and library.library_path())"


def test_processes_that_start_at_once_compile_once(tmp_path):
    """And say so once, with the variable that switches the kernels off."""
    compiler, log, folder = tmp_path / "compiler", tmp_path / "log", tmp_path / "kernels"
    compiler.write_text(COUNTING_COMPILER.format(log=log))
    compiler.chmod(0o700)
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "CXX": str(compiler)}
    command, pipes = [sys.executable, "-c", USE_KERNELS], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=env, text=True, **pipes) for _ in range(4)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert log.read_text().count("once") == 1
    assert {out.strip() for out, _ in outputs} == {str(path) for path in folder.iterdir()}
    said = "".join(err for _, err in outputs)
    assert said.count("Compiling kernels") == 1 and "DIFFUSERS_HDIT_KERNELS=0" in said


def test_a_lock_of_a_killed_process_does_not_block(no_kernels_yet):
    no_kernels_yet.mkdir(mode=0o700)
    name = cpp_kernels.library_path().name
    (no_kernels_yet / name).unlink()
    (no_kernels_yet / f"{name}.lock").touch()
    assert cpp_kernels.library_path().is_file()


SWITCHED_OFF = """
import torch
from diffusers_hdit import HDiTModel, ops
model = HDiTModel(sample_size=32, patch_size=2, widths=(32, 64), depths=(1, 1), attention_head_dim=16, kernel_size=3)
model(torch.randn(1, 3, 32, 32), 0.0)
print(ops.report(model))
"""


def test_the_environment_variable_switches_kernels_off(tmp_path):
    """Nothing is compiled, and the report says why."""
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "kernels"), "DIFFUSERS_HDIT_KERNELS": "0"}
    done = subprocess.run([sys.executable, "-c", SWITCHED_OFF], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "kernels").exists()
    assert "switched off" in done.stdout and "tiled (not cpp: kernels are switched off)" in done.stdout
