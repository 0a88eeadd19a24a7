"""The library of C++ kernels: compiled once, kept where nobody else writes, and what happens without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_neighborhood import skip_without, tensors

from diffusers_hdit.ops.cpu import library as cpp_kernels
from diffusers_hdit.ops.neighborhood import neighborhood_attention, unavailable_reason


CPU = {"device": "cpu", "dtype": torch.float32, "head_dim": 16, "training": True}


@pytest.fixture(autouse=True)
def kernels():
    skip_without("cpp")


def test_compiled_once_and_kept(no_kernels_yet, monkeypatch):
    assert unavailable_reason("cpp", **CPU) is None
    (library,) = no_kernels_yet.iterdir()
    monkeypatch.setattr(subprocess, "run", None)
    assert cpp_kernels.compiled() == library
    assert no_kernels_yet.stat().st_mode & 0o077 == 0
    no_kernels_yet.chmod(0o777)
    assert cpp_kernels._folders()[0] == no_kernels_yet
    with pytest.raises(PermissionError, match="others than this user may write to it"):
        cpp_kernels._compile("g++", [], no_kernels_yet, library.name)


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
    assert cpp_kernels.compiled().parent == tmp_path / f"diffusers_hdit-{os.getuid()}"


def test_processes_that_compile_at_once(tmp_path):
    code = "from diffusers_hdit import cpp_kernels as n; print(n.library() and n.compiled())"
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert paths == {str(path) for path in tmp_path.iterdir()} and Path(paths.pop()).suffix == ".so"
