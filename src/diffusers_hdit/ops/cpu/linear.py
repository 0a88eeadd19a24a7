"""A linear layer by oneDNN in float32, as an operator of PyTorch: with gradients of any order, and one node of a traced graph.

No public function of PyTorch calls oneDNN for float32 products where MKL is there. The private operator used here is the
one into which `torch.compile` turns layers of constant weights; without it, `ops/linear.py` leaves the product to MKL.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _result(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    gradient = gradient.contiguous()  # strides of zero, as a sum hands them back, would be rounded otherwise
    of_x = linear(gradient, weight.t()) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return of_x, None
    x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
    # A sum over tokens: up to twice as fast where the result has fewer rows than columns.
    if x.shape[-1] <= gradient.shape[-1]:
        return of_x, linear(x.t(), gradient.t()).t()
    return of_x, linear(gradient.t(), x.t())


if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    raise ImportError("this PyTorch has no torch.ops.mkldnn._linear_pointwise")

_library = torch.library.Library("diffusers_hdit", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight) -> Tensor")
_library.impl("linear", _multiply, "CPU")
_NAME = "diffusers_hdit::linear"
torch.library.register_fake(_NAME, _result, lib=_library)
torch.library.register_autograd(_NAME, _gradients, setup_context=_keep, lib=_library)

# `(..., D)` and a weight `(D', D)`, both float32 on a CPU, to `(..., D')`.
linear = torch.ops.diffusers_hdit.linear.default


@register_flop_formula(torch.ops.diffusers_hdit.linear)
def _operations(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[0]
