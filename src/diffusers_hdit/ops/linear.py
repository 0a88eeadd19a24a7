"""Linear layers, with the library that multiplies matrices fastest on the processor at hand.

For float32 PyTorch calls MKL on x86. MKL uses AVX-512 on Intel's processors only; oneDNN, which PyTorch has for other
purposes, on all that have it, and is up to twice as fast there. Shapes: B batch, D and D' widths.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from ..utils.remote_code import package_module


# Multiplications for one sample, below which what a call costs outweighs what it saves.
_LEAST = 2 * 1024**2


class Linear(nn.Linear):
    """nn.Linear without a bias. `torch.backends.mkldnn.flags(enabled=False)` leaves all of it to PyTorch."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, ..., D) -> (B, ..., D')`."""
        if onednn_takes(x, self.weight):
            return torch.ops.diffusers_hdit.linear.default(x, self.weight)
        return F.linear(x, self.weight)


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Asked of one sample's size, not of the batch's, on which compiled graphs must not depend."""
    return (
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[1:].numel() * len(weight) >= _LEAST
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
        and not _transforms(x, weight)
    )


def _transforms(*tensors: Tensor) -> bool:
    """Whether something of torch.func is under way, or forward-mode differentiation: there are no rules for them."""
    active = torch._C._are_functorch_transforms_active()
    return active or (
        not torch.compiler.is_compiling() and any(unpack_dual(tensor).tangent is not None for tensor in tensors)
    )


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    return torch.backends.mkldnn.enabled and _mkl_is_slow()


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether this processor has AVX-512 that MKL makes no use of, and there is another library to ask, and a way to."""
    try:
        package_module("ops.cpu.linear_onednn")
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
