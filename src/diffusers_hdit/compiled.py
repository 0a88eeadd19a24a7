"""Whether the C++ kernels for CPUs can run here. Code that comes with a repository asks too, and brings none along."""

import torch

from .remote_code import package_module


_library_problem: str | None = None


@torch.compiler.assume_constant_result
def library_problem() -> str:
    """Why there are no compiled kernels; empty if there are, compiled and known to PyTorch now at the latest."""
    global _library_problem
    if _library_problem is None:
        try:
            package_module("cpp_kernels").library()
            package_module("neighborhood_cpp")
            package_module("fused_cpp")
            _library_problem = ""
        # Among others: no package around the code of a repository.
        except (ImportError, OSError, RuntimeError) as error:
            _library_problem = str(error)
    return _library_problem
