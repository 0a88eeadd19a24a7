import os
from pathlib import Path

import pytest
import torch

from diffusers_hdit import HDiTModel
from diffusers_hdit.ops import kernels
from diffusers_hdit.ops.cpu import library as cpp_kernels


# Tests run side by side (pytest -n): a thread each, or they stand in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Where weights lie in memory decides the last bits of MKL's products on AMD's processors, unless it is told otherwise.
os.environ.setdefault("MKL_CBWR", "AUTO")

REPOSITORY = Path(__file__).parents[1]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """In the 2-norm, computed in float64."""
    value, reference = value.detach().double(), reference.detach().double()
    return ((value - reference).norm() / reference.norm()).item()


def randomize(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Random matrices everywhere: a new model's output is zero, and so would be most gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def kept_bytes(model: torch.nn.Module) -> int:
    """Bytes besides the weights that autograd keeps of a forward pass of a real image of 32×32 pixels."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(1, 3, 32, 32), 0.0)
    return sum(storage.nbytes() for storage in kept.values())


SMALL = {
    "sample_size": 32,
    "patch_size": 2,
    "widths": (32, 48, 64),
    "depths": (2, 1, 2),
    "attention_head_dim": 16,
    "kernel_size": 3,
    "mapping_width": 32,
}


@pytest.fixture
def no_kernels_yet(monkeypatch, tmp_path):
    """The folder of compiled kernels, empty, as in a new process."""
    monkeypatch.setattr(kernels, "_library_problem", None)
    monkeypatch.setattr(cpp_kernels, "_library", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(cpp_kernels.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / "extensions"


@pytest.fixture
def make_model():
    """Makes a small random model; keyword arguments override its configuration."""
    return lambda **overrides: randomize(HDiTModel(**{**SMALL, **overrides})).eval()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Let the test keep nothing outside its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


FEATURE_NETWORK = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.GELU())
"""


@pytest.fixture
def feature_folder(tmp_path, monkeypatch):
    """A folder, in which processes find a feature network: tiny_features:make."""
    (tmp_path / "tiny_features.py").write_text(FEATURE_NETWORK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    return tmp_path
