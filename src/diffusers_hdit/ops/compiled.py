"""Whether the C++ kernels for CPUs can run here. Code that comes with a repository asks too, and brings none along."""

from contextlib import contextmanager

import torch
from torch import Tensor

from ..utils.remote_code import package_module


_library_problem: str | None = None
_formulas_only = False


@contextmanager
def formulas():
    """Norms, activations, and queries and keys by PyTorch's operations meanwhile, as on a GPU or without a compiler."""
    global _formulas_only
    before, _formulas_only = _formulas_only, True
    try:
        yield
    finally:
        _formulas_only = before


@torch.compiler.assume_constant_result
def library_problem() -> str:
    """Why there are no compiled kernels; empty if there are, compiled and known to PyTorch now at the latest."""
    global _library_problem
    if _library_problem is None:
        try:
            package_module("ops.cpu.library").library()
            package_module("ops.cpu.neighborhood")
            package_module("ops.cpu.fused")
            _library_problem = ""
        # Among others: no package around the code of a repository.
        except (ImportError, OSError, RuntimeError) as error:
            _library_problem = str(error)
    return _library_problem


def has_kernels(tensor: Tensor) -> bool:
    """Whether `fused_cpp.py` works on it: on a CPU, in float32 or bfloat16. In a traced graph it does not, for the compiler
    makes one pass of formulas and what is around them."""
    return (
        not torch.compiler.is_compiling()
        and not _formulas_only
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and not library_problem()
    )
