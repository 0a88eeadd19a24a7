"""The few operations where a kernel matters, each with one reference in PyTorch.

    rms_norm.py, geglu.py, rotary.py, linear.py   the operations: what they compute, in PyTorch
    neighborhood_attention.py                     the public function; neighborhood_backends.py: PyTorch, Flex, NATTEN
    registry.py                                   how a kernel is found, and how to add one
    kernels.py                                    the kernels that come with the package: cpu/ (C++), triton/
    report.py                                     what would run on a device, and why

`print(diffusers_hdit.ops.report(model, "cuda"))` says what would run. The C++ kernels are compiled when they are first used,
once for all processes; `set_kernels_enabled(False)` or the environment variable DIFFUSERS_HDIT_KERNELS=0 switches all
kernels off, and everything runs on plain PyTorch.
"""

from .geglu import geglu
from .kernels import Kernel, register_kernel
from .linear import linear
from .neighborhood_attention import cosine_neighborhood_attention, neighborhood_attention, sliding_window_attention
from .registry import kernels_enabled, reference, set_kernels_enabled
from .report import KernelReport, report
from .rms_norm import rms_norm
from .rotary import normalize_and_rotate


__all__ = [
    "Kernel",
    "KernelReport",
    "cosine_neighborhood_attention",
    "geglu",
    "kernels_enabled",
    "linear",
    "neighborhood_attention",
    "normalize_and_rotate",
    "reference",
    "register_kernel",
    "report",
    "rms_norm",
    "set_kernels_enabled",
    "sliding_window_attention",
]
