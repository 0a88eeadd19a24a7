"""Operations have one reference in PyTorch and any number of kernels, which run where they can.

`rms_norm`, `geglu`, `normalize_and_rotate`, `linear` and `neighborhood_attention` look up a kernel here, and else run
their reference. Kernels are registered in `kernels.py`; `report.py` says what would run and why.

To add one, say what it can run on, in words and as a quick test of each call's arguments:

    >>> from diffusers_hdit.ops import Kernel, register_kernel
    >>> kernel = Kernel("mine", run=my_geglu, accepts=lambda x: x.is_cuda, problem=lambda device, dtype: None)
    >>> register_kernel("geglu", kernel)  # run(hidden_states) -> result, as the reference

A kernel that was registered later is asked first. For "neighborhood_attention" see `neighborhood_attention.py`.

Code that is carried by saved pipelines finds the kernels of the installed package, if that has the same version.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..utils.remote_code import package_module


_enabled = os.environ.get("DIFFUSERS_HDIT_KERNELS", "1") != "0"
_kernels: dict | None = None


def set_kernels_enabled(enabled: bool) -> None:
    """
    Switch all kernels of this package on or off; off, everything runs on plain PyTorch.

    The environment variable DIFFUSERS_HDIT_KERNELS=0 switches them off from the start, so that nothing is compiled.
    """
    global _enabled
    _enabled = enabled


def kernels_enabled() -> bool:
    """Return whether kernels of this package may run."""
    return _enabled


@contextmanager
def reference() -> Iterator[None]:
    """Run the references instead of kernels inside the block."""
    before = _enabled
    set_kernels_enabled(False)
    try:
        yield
    finally:
        set_kernels_enabled(before)


def kernels_of(operation: str) -> dict:
    """Return the kernels of an operation by name, the preferred ones first; none without the package."""
    global _kernels
    if _kernels is None:
        try:
            _kernels = package_module("ops.kernels").KERNELS
        except ImportError:  # carried code, and no package of its version
            _kernels = {}
    return _kernels.get(operation, {})


def find_kernel(operation: str, *args) -> Callable | None:
    """
    Return what runs an operation on these arguments, None for the reference.

    In a traced graph it is the reference: the compiler fuses it with what is around it.
    """
    if torch.compiler.is_compiling() or not _enabled:
        return None
    for kernel in kernels_of(operation).values():
        if kernel.accepts(*args):
            return kernel.run
    return None
