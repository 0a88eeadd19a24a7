"""Derivatives other than plain gradients: `torch.func` (jvp, vmap, grad), forward mode, gradients of gradients.

Fast kernels know one derivative each. Where another is asked for, operations run in PyTorch, which knows them all.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel


def is_transformed(*tensors: Tensor) -> bool:
    """Return whether a transform of `torch.func` is active, or one of the tensors carries a forward-mode tangent."""
    return torch._C._are_functorch_transforms_active() or (
        not torch.compiler.is_compiling() and any(unpack_dual(tensor).tangent is not None for tensor in tensors)
    )


def differentiable_attention(*tensors: Tensor) -> AbstractContextManager:
    """Return a context in which PyTorch's attention has all derivatives, if the tensors need others than gradients."""
    return sdpa_kernel(SDPBackend.MATH) if is_transformed(*tensors) else nullcontext()


def vjp_of_reference(reference: Callable, inputs: tuple, of_output: Tensor) -> tuple:
    """Return gradients that can be differentiated again, by those of the reference."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.vjp(reference, *inputs)[1](of_output)
