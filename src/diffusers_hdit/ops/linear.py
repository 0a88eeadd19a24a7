"""Linear layers, multiplied by the library that is fastest on this processor.

For float32 PyTorch calls MKL on x86. MKL uses AVX-512 on Intel's processors only; oneDNN, which PyTorch has for other
purposes, on all that have it, and is up to twice as fast there. Shapes: B batch, D and D' widths.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.remote_code import package_module
from .derivatives import is_transformed
from .registry import kernels_enabled


# Multiplications for one sample, below which what a call costs outweighs what it saves.
_LEAST = 2 * 1024**2


class Linear(nn.Linear):
    """An nn.Linear without bias; `torch.backends.mkldnn.flags(enabled=False)` leaves all products to PyTorch."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, ..., D)` to `(B, ..., D')`."""
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply `(B, ..., D)` by the transpose of a weight `(D', D)`."""
    if onednn_accepts(x, weight):
        return torch.ops.diffusers_hdit.linear.default(x, weight)
    return F.linear(x, weight)


def onednn_accepts(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN multiplies them; one sample's size decides, since compiled graphs must not depend on the batch."""
    return (
        kernels_enabled()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[1:].numel() * len(weight) >= _LEAST
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
        and not is_transformed(x, weight)  # its operator has no rules for them
    )


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    return torch.backends.mkldnn.enabled and _mkl_is_slow()


@functools.cache
def _mkl_is_slow() -> bool:
    """Return whether this processor has AVX-512 that MKL does not use, and oneDNN is there and can be called."""
    try:
        package_module("ops.cpu.linear")
    except ImportError:
        return False
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in _vendor()


def _vendor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:  # not Linux
        return platform.processor()
