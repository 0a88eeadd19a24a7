"""Exact 2-D neighborhood attention: one function, interchangeable backends.

Hassani et al. 2023, "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143

To add a kernel, register it (see `registry.py`) under "neighborhood_attention" with

    run(query, key, value, kernel_size, scale, norm=None, cos=None, sin=None)

where `norm (n,)` and `cos, sin (h, w, n, c)`, if given, say how queries and keys are to be normalized and rotated first
(`rotary.py`), and with problem(device_type, dtype, head_dim). Its name is then a backend, which "auto" tries first.

Shapes: B batch, h×w grid of tokens, n heads, d channels of a head, kh×kw window.
"""

import torch
from torch import Tensor

from .derivatives import is_transformed
from .neighborhood_backends import (
    centred_start,
    dense_attention,
    flex_attention_problem,
    flex_neighborhood_attention,
    natten_neighborhood_attention,
    natten_problem,
    tiled_attention,
    whole_grid_attention,
)
from .registry import kernels_enabled, kernels_of
from .rotary import normalize_and_rotate


# Those of the package (`triton` and `cpp`), and those of `neighborhood_backends.py`.
BACKENDS = ("natten", "triton", "cpp", "tiled", "flex", "dense")
# What "auto" takes: the first that can run, as measured (docs/benchmarks.md).
_AUTO = {"cuda": ("triton", "natten", "tiled"), "cpu": ("cpp", "tiled")}

# Those that PyTorch differentiates in every way.
_WITH_ALL_DERIVATIVES = ("tiled", "dense")


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every token to the `kh x kw` window around it (Hassani et al. 2023, arXiv 2204.07143).

    The window of token `(i, j)` starts at row `clamp(i - kh // 2, 0, h - kh)` and column
    `clamp(j - kw // 2, 0, w - kw)`: near a border it moves inside the grid and never shrinks. All backends compute
    the same values up to rounding; a window as large as the grid is ordinary attention and skips the backend.

    Args:
        query, key, value: `(B, h, w, n, d)`, any strides, one dtype and device.
        kernel_size: window `k` or `(kh, kw)` in tokens, odd, at most `(h, w)`.
        scale: factor on the scores before the softmax; `None` is `d ** -0.5`.
        backend: `"auto"` (on CUDA `triton`, else `natten`; on a CPU `cpp`; `tiled` where they can't run) or one of
            `BACKENDS`:

            | name     | what runs                               | where                                       |
            |----------|-----------------------------------------|---------------------------------------------|
            | `natten` | NATTEN's compiled kernels               | CUDA with NATTEN's library                  |
            | `triton` | our own kernels, halos never stored     | CUDA with Triton; heads of 16, 32, 64, 128  |
            | `cpp`    | our own kernels, compiled at first use  | CPU with Linux and a C++ compiler           |
            | `tiled`  | scaled dot products on tiles with halos | everywhere, training and inference          |
            | `flex`   | compiled FlexAttention                  | CUDA; CPU without gradients                 |
            | `dense`  | one masked `(h * w) x (h * w)` product  | everywhere; memory grows with `(h * w) ** 2` |

    Returns:
        `(B, h, w, n, d)`.

    Raises:
        ValueError: for tensors that are not `(B, h, w, n, d)` of one shape, a window that is even or larger than the
            grid, an unknown backend, or a named backend that cannot run on these tensors.
    """
    kernel = _checked_kernel(query, key, value, kernel_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _run(_chosen(backend, kernel, query, key, value), query, key, value, kernel, scale)


def cosine_neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    scale: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None,
    backend: str = "auto",
) -> Tensor:
    """
    Normalize and rotate queries and keys (`normalize_and_rotate`), then attend to neighborhoods with a softmax scale of 1.

    The kernels `triton` and `cpp` normalize and rotate as they load.

    Args:
        query, key, value, kernel_size, backend: as for `neighborhood_attention`.
        scale: `(n,)`, positive: the factor of each head's cosines in the logits.
        image_rotary_emb: cosines and sines of the angles, `(h, w, n, c)` each, by which the channels `i` and `c + i` of a
            token are rotated, `2 * c` at most d; None for no rotation.

    Returns:
        `(B, h, w, n, d)`.

    Raises:
        ValueError: as `neighborhood_attention`, and for scales and angles of other shapes.
    """
    kernel = _checked_kernel(query, key, value, kernel_size)
    _, h, w, n, d = query.shape
    if scale.shape != (n,):
        raise ValueError(f"scale must have one number for each of the {n} heads, got shape {tuple(scale.shape)}.")
    for table in image_rotary_emb or ():
        if table.shape[:-1] != (h, w, n) or 2 * table.shape[-1] > d:
            raise ValueError(
                f"image_rotary_emb must be two tensors ({h}, {w}, {n}, c) with c at most {d // 2}, got {tuple(table.shape)}."
            )
    name = _chosen(backend, kernel, query, key, value, scale)
    if name in kernels_of("neighborhood_attention"):
        cos, sin = (None, None) if image_rotary_emb is None else (x.float().contiguous() for x in image_rotary_emb)
        return _run(name, query, key, value, kernel, 1.0, scale.float().sqrt(), cos, sin)
    query, key = (normalize_and_rotate(x, scale, image_rotary_emb) for x in (query, key))
    return _run(name, query, key, value, kernel, 1.0)


def sliding_window_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | tuple[int, int], scale: float | None = None
) -> Tensor:
    """Attend from every token to the `kh x kw` window centred on it (Ramachandran et al. 2019, arXiv 1906.05909).

    The window of token `(i, j)` is rows `i - kh // 2` to `i + kh // 2` and columns `j - kw // 2` to `j + kw // 2`, as
    far as they are in the grid: near a border it shrinks, where that of `neighborhood_attention` moves. Computed on
    tiles with halos; the window may be larger than the grid.

    Args:
        query, key, value: `(B, h, w, n, d)`, any strides, one dtype and device.
        kernel_size: window `k` or `(kh, kw)` in tokens, odd.
        scale: factor on the scores before the softmax; `None` is `d ** -0.5`.

    Returns:
        `(B, h, w, n, d)`.

    Raises:
        ValueError: for tensors that are not `(B, h, w, n, d)` of one shape, and a window that is even.
    """
    kernel = _checked_kernel(query, key, value, kernel_size, inside=False)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return tiled_attention(query, key, value, kernel, scale, centred_start)


def unavailable_reason(
    backend: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    training: bool,
    kernel_size: tuple[int, int] | None = None,
) -> str | None:
    """Return why a backend can't run on such tensors and what to use instead, or `None` if it can.

    Args:
        backend: one of `BACKENDS`, or the name of a registered kernel.
        device, dtype, head_dim: of the query, key and value.
        training: whether gradients are needed.
        kernel_size: `(kh, kw)` in tokens if known.

    Raises:
        ValueError: for an unknown backend.
    """
    kernels = kernels_of("neighborhood_attention")
    if backend not in (*BACKENDS, *kernels):
        raise ValueError(
            f"Unknown neighborhood attention backend {backend!r}; choose 'auto' or one of {', '.join(BACKENDS)}."
        )
    device_type = torch.device(device).type
    if backend == "natten":
        problem = natten_problem(device_type, dtype, head_dim, training, kernel_size)
    elif backend == "flex":
        problem = flex_attention_problem(device_type, dtype, head_dim, training)
    elif backend in ("triton", "cpp") and not kernels:
        problem = "its kernels come with the package diffusers-hdit, which is not installed, or in another version"
    elif backend in kernels:
        problem = (
            kernels[backend].problem(device_type, dtype, head_dim) if kernels_enabled() else "kernels are switched off"
        )
    else:
        problem = None
    if problem is None:
        return None
    return f"Neighborhood attention backend {backend!r} cannot run here: {problem}. Use 'auto' or 'tiled' instead."


def auto_backends(device_type: str) -> tuple[str, ...]:
    """Return the backends that "auto" tries on a device, in order; the last one always works."""
    others = [name for name in kernels_of("neighborhood_attention") if name not in BACKENDS]
    return (*others, *_AUTO.get(device_type, ("tiled",)))


def _run(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: tuple[int, int],
    scale: float,
    norm: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    if name in _IMPLEMENTATIONS:
        return _IMPLEMENTATIONS[name](query, key, value, kernel, scale)
    if name == "triton" and scale <= 0:  # it scales after it has looked for the largest score
        query, scale = query * (-1 if scale else 0), -scale or 1.0
    return kernels_of("neighborhood_attention")[name].run(query, key, value, kernel, scale, norm, cos, sin)


def _chosen(backend: str, kernel: tuple[int, int], query: Tensor, *others: Tensor) -> str:
    """Return the name of the backend that computes this; raise ValueError for a named one that can't."""
    whole_grid = kernel == tuple(query.shape[1:3])
    if whole_grid and backend == "auto":
        return "whole grid"
    if is_transformed(query, *others):
        if backend not in ("auto", *_WITH_ALL_DERIVATIVES):
            raise ValueError(
                f"Neighborhood attention backend {backend!r} has no rules for torch.func (vmap, jvp, ...) and forward-mode "
                "derivatives. Use 'auto' or 'tiled', or put the call in `with diffusers_hdit.ops.reference():`."
            )
        backend = "tiled" if backend == "auto" else backend
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, *others))
    for name in auto_backends(query.device.type) if backend == "auto" else (backend,):
        reason = unavailable_reason(
            name,
            device=query.device,
            dtype=query.dtype,
            head_dim=query.shape[-1],
            training=training,
            kernel_size=kernel,
        )
        if reason is None:
            return "whole grid" if whole_grid else name
    raise ValueError(reason)


def _checked_kernel(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | tuple[int, int], inside: bool = True
) -> tuple[int, int]:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 5:
        raise ValueError(f"Expected tensors of shape (B, h, w, n, d), got {shapes}; reshape them to five dimensions.")
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(f"Query, key and value must have one shape (B, h, w, n, d), got {shapes}.")
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(kernel) != 2 or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernel):
        raise ValueError(
            f"kernel_size must be a positive odd integer or a pair of them, got {kernel_size!r}; "
            "an even window has no middle, choose the next odd size."
        )
    h, w = query.shape[1:3]
    if inside and (kernel[0] > h or kernel[1] > w):
        raise ValueError(
            f"kernel_size {kernel} is larger than the {h}x{w} grid of tokens; "
            "use a smaller window, a larger image, or global attention."
        )
    return kernel


def _whole_grid(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float) -> Tensor:
    return whole_grid_attention(query, key, value, scale)


_IMPLEMENTATIONS = {
    "natten": natten_neighborhood_attention,
    "tiled": tiled_attention,
    "flex": flex_neighborhood_attention,
    "dense": dense_attention,
    "whole grid": _whole_grid,
}
