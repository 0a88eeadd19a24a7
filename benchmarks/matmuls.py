"""The matrix products of a network, recorded from a real call and run alone.

Nothing about the network is assumed: a dispatch mode sees every operation that reaches PyTorch's kernels. Products of
matrices are repeated with operands of the same shapes and strides. An attention kernel counts as its products, as many
as its mathematics needs: two forward (scores, and probabilities with values) and four backward (gradients of
probabilities, values, queries and keys; that kernels compute the scores once more is not counted), on the keys that
the kernel is given, those that a mask hides included.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_hdit.ops.cpu.linear import linear


WITHOUT_PRODUCTS = ("diffusers_hdit::geglu", "diffusers_hdit::rms_norm", "diffusers_hdit::normalize_and_rotate")


@dataclass(frozen=True)
class Product:
    """`kind` "linear" or "attention"; shape and strides of the two operands, 2-D or 3-D (batched); whether the network
    asks oneDNN for it (`linear.py`)."""

    kind: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    strides: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype
    by_onednn: bool = False

    @property
    def macs(self) -> int:
        return math.prod(self.shapes[0]) * self.shapes[1][-1]

    def operands(self, device: torch.device) -> list[Tensor]:
        return [
            torch.empty_strided(shape, stride, dtype=self.dtype, device=device).normal_()
            for shape, stride in zip(self.shapes, self.strides, strict=True)
        ]

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if self.by_onednn:
            return linear(a, b.t())
        return a @ b


class RecordProducts(TorchDispatchMode):
    """Counts the products of what runs inside in `products`; `opaque` holds operators that hide what they compute."""

    def __init__(self):
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.opaque: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.add("linear" if name == "mm" else "attention", *args[:2])
        elif name in ("addmm", "baddbmm"):
            self.add("linear" if name == "addmm" else "attention", *args[1:3])
        elif function is linear:
            x, weight = args
            self.add("linear", x.flatten(0, -2), weight.t(), by_onednn=True)
        elif name.startswith("_scaled_dot_product"):
            # The gradient comes before query, key and value.
            self.add_attention(*args[1:4] if "backward" in name else args[:3], backward="backward" in name)
        elif function.namespace not in ("aten", "prim", "prims", "profiler"):
            operator = f"{function.namespace}::{name}"
            if not operator.startswith(WITHOUT_PRODUCTS):
                self.opaque.add(operator)
        return function(*args, **(kwargs or {}))

    def add(self, kind: str, a: Tensor, b: Tensor, by_onednn: bool = False) -> None:
        shapes, strides = (tuple(a.shape), tuple(b.shape)), (tuple(a.stride()), tuple(b.stride()))
        self.products[Product(kind, shapes, strides, a.dtype, by_onednn)] += 1

    def add_attention(self, query: Tensor, key: Tensor, value: Tensor, backward: bool) -> None:
        queries, keys, dim, count = query.shape[-2], key.shape[-2], query.shape[-1], math.prod(query.shape[:-2])

        def add(rows: int, inner: int, columns: int, transposed: bool) -> None:
            strides = (inner * columns, 1, inner) if transposed else (inner * columns, columns, 1)
            product = Product(
                "attention", ((count, rows, inner), (count, inner, columns)), ((rows * inner, inner, 1), strides),
                query.dtype,
            )  # fmt: skip
            self.products[product] += 1

        if not backward:
            add(queries, dim, keys, True)
            add(queries, keys, value.shape[-1], False)
            return
        add(queries, value.shape[-1], keys, True)  # gradient of the probabilities
        add(keys, queries, value.shape[-1], False)  # of the values
        add(queries, keys, dim, False)  # of the queries
        add(keys, queries, dim, False)  # of the keys


def record(call) -> RecordProducts:
    with RecordProducts() as recorded:
        call()
    return recorded


class Replay:
    """Runs recorded products, as often as they were, on random operands that take turns."""

    def __init__(self, products: Counter[Product], device: torch.device):
        self.work = [
            (product.multiply, [product.operands(device) for _ in range(2)], count)
            for product, count in products.items()
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        for multiply, operands, count in self.work:
            for i in range(count):
                multiply(*operands[i % 2])
