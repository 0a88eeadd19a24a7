"""Exact 2-D neighborhood attention: one function, interchangeable backends.

Hassani et al. 2023, "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143

Shapes:
    B batch              h, w grid of tokens        n heads         d channels of a head
    kh, kw window        th, tw tile of queries     hh, hw halo: the keys that a tile of queries can see
    R, C rows and columns of tiles                  T = R * C tiles
"""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.remote_code import package_module
from .compiled import library_problem
from .cosine import cosine_similarity
from .plans import plan


BACKENDS = ("natten", "triton", "cpp", "tiled", "flex", "dense")

_TILE = (8, 8)
# The GPU kernels of FlexAttention take up to 128 queries or keys at once and refuse smaller mask blocks.
_FLEX_TILES = {"cpu": (8, 8), "cuda": (8, 16)}
_NATTEN_TRAINS_SINCE = (0, 21, 7)


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
        backend: `"auto"` (`natten` or `cpp` where they work, else `tiled`) or one of `BACKENDS`:

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
    name = _chosen(backend, kernel, query, key, value)
    return _IMPLEMENTATIONS[name](query, key, value, kernel, scale)


def cosine_neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    scale: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    backend: str = "auto",
) -> Tensor:
    """`neighborhood_attention` of queries and keys that are still to be scaled and rotated (`cosine_similarity`), with
    scale 1. The kernels `triton` and `cpp` do that as they load them.

    Args:
        query, key, value, kernel_size, backend: as for `neighborhood_attention`.
        scale: `(n,)`, positive: the factor of each head's cosines in the logits.
        rotary: cosines and sines of the angles, `(h, w, n, c)` each, that turn channels `i` and `c + i` of a token, `2 * c`
            at most d; None for no rotation.

    Returns:
        `(B, h, w, n, d)`.

    Raises:
        ValueError: as `neighborhood_attention`, and for scales and angles of other shapes.
    """
    kernel = _checked_kernel(query, key, value, kernel_size)
    _, h, w, n, d = query.shape
    if scale.shape != (n,):
        raise ValueError(f"scale must have one number for each of the {n} heads, got shape {tuple(scale.shape)}.")
    for table in rotary or ():
        if table.shape[:-1] != (h, w, n) or 2 * table.shape[-1] > d:
            raise ValueError(
                f"rotary must be two tensors ({h}, {w}, {n}, c) with c at most {d // 2}, got {tuple(table.shape)}."
            )
    name = _chosen(backend, kernel, query, key, value, scale)
    if name in _OWN_KERNELS:
        return _own_kernels(name, query, key, value, kernel, 1.0, scale.float().sqrt(), rotary)
    query, key = cosine_similarity(query, scale, rotary), cosine_similarity(key, scale, rotary)
    return _IMPLEMENTATIONS[name](query, key, value, kernel, 1.0)


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
    return _tiled(query, key, value, kernel, scale, _centred_start)


def unavailable_reason(
    backend: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    training: bool,
    kernel_size: tuple[int, int] | None = None,
) -> str | None:
    """Say why a backend cannot run on such tensors and what to use instead, or return `None` if it can.

    Args:
        backend: one of `BACKENDS`.
        device, dtype, head_dim: of the query, key and value.
        training: whether gradients are needed.
        kernel_size: `(kh, kw)` in tokens if known.

    Raises:
        ValueError: for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"Unknown neighborhood attention backend {backend!r}; choose 'auto' or one of {', '.join(BACKENDS)}."
        )
    device_type = torch.device(device).type
    if backend == "natten":
        problem = _natten_problem(device_type, dtype, head_dim, training, kernel_size)
    elif backend == "triton":
        problem = _triton_problem(device_type, dtype, head_dim)
    elif backend == "cpp":
        problem = _cpp_problem(device_type, dtype)
    elif backend == "flex":
        problem = _flex_problem(device_type, dtype, head_dim, training)
    else:
        problem = None
    if problem is None:
        return None
    return f"Neighborhood attention backend {backend!r} cannot run here: {problem}. Use 'auto' or 'tiled' instead."


def _chosen(backend: str, kernel: tuple[int, int], query: Tensor, *others: Tensor) -> str:
    """The name, in `_IMPLEMENTATIONS`, of what computes this; raises ValueError for a backend that cannot."""
    whole_grid = kernel == tuple(query.shape[1:3])
    if whole_grid and backend == "auto":
        return "whole grid"
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, *others))
    for name in ("natten", "cpp", "tiled") if backend == "auto" else (backend,):
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


def _window_start(index: Tensor, kernel: int, length: int) -> Tensor:
    """First key that the query at `index` sees along an axis of `length` tokens."""
    return (index - kernel // 2).clamp(0, length - kernel)


def _centred_start(index: Tensor, kernel: int, length: int) -> Tensor:
    """The same for a window that stays centred; negative where it reaches over the border."""
    # Queries that only fill up a tile see what the last one sees: a softmax over no keys would be NaN.
    return index.clamp(max=length - 1) - kernel // 2


# The code that comes with a repository is imported under other names in the same process: an operator for each.
_OPERATORS = re.sub("[^0-9A-Za-z_]", "_", __name__)


# ---- tiled ----


def _axis_halos(
    length: int, kernel: int, tile: int, device: torch.device, start: Callable = _window_start
) -> tuple[Tensor, Tensor]:
    """Keys `(tiles, halo)` of each tile along one axis, and which of them `(tiles, tile, halo)` each query sees."""
    halo = tile + kernel - 1
    if halo > length:  # not min(): a traced graph keeps the constant for all lengths of one side
        halo = length
    first = torch.arange(-(-length // tile), device=device)[:, None] * tile
    query = first + torch.arange(tile, device=device)
    key = (first - kernel // 2).clamp(0, length - halo) + torch.arange(halo, device=device)
    offset = key[:, None, :] - start(query, kernel, length)[:, :, None]
    return key, (offset >= 0) & (offset < kernel)


def _tiled_plan(
    h: int, w: int, kh: int, kw: int, th: int, tw: int, dtype: torch.dtype, device: torch.device, start: Callable
):
    """Flat key indices `(T * hh * hw)` and additive mask `(T, 1, th * tw, hh * hw)`."""
    rows, sees_rows = _axis_halos(h, kh, th, device, start)
    cols, sees_cols = _axis_halos(w, kw, tw, device, start)
    keys = (rows[:, None, :, None] * w + cols[None, :, None, :]).flatten()
    sees = sees_rows[:, None, :, None, :, None] & sees_cols[None, :, None, :, None, :]  # R, C, th, tw, hh, hw
    sees = sees.flatten(4, 5).flatten(2, 3).flatten(0, 1)[:, None]
    # Rows that start at multiples of 16 elements spare the memory-efficient CUDA kernel a padded copy per call.
    bias = torch.zeros(*sees.shape[:3], -(-sees.shape[3] // 16) * 16, dtype=dtype, device=device)
    bias = bias[..., : sees.shape[3]].masked_fill_(~sees, float("-inf"))
    return keys, bias


def _split(x: Tensor, th: int, tw: int) -> Tensor:
    """(B, h, w, n, d) -> (B, R, th, C, tw, n, d); zeros fill the tiles that reach over the border."""
    h, w = x.shape[1:3]
    if h % th or w % tw:
        x = F.pad(x, (0, 0, 0, 0, 0, -w % tw, 0, -h % th))
    return x.unflatten(2, (-1, tw)).unflatten(1, (-1, th))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` `(N, ...)` at `index` `(M)`."""
    # As one node of a traced graph on the CPU: Inductor fails to simplify the index in inference (torch 2.13), and gets
    # the sum over repeated indices in the backward pass wrong (torch 2.6).
    opaque = torch.compiler.is_compiling() and x.device.type == "cpu"
    return _opaque_gather(x, index) if opaque else x.index_select(0, index)


@torch.library.custom_op(f"{_OPERATORS}::gather_rows", mutates_args=())
def _opaque_gather(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


@_opaque_gather.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:])


@torch.library.custom_op(f"{_OPERATORS}::sum_rows", mutates_args=())
def _opaque_sum(x: Tensor, index: Tensor, length: int) -> Tensor:
    """The transpose of `_opaque_gather`: rows of `x` `(M, ...)` added up at `index` into `(length, ...)`."""
    return x.new_zeros(length, *x.shape[1:]).index_add_(0, index, x)


@_opaque_sum.register_fake
def _(x: Tensor, index: Tensor, length: int) -> Tensor:
    return x.new_empty(length, *x.shape[1:])


def _keep_index(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.length = inputs[0].shape[0]


def _sum_gradient(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    return _opaque_sum(gradient, *ctx.saved_tensors, ctx.length), None


_opaque_gather.register_autograd(_sum_gradient, setup_context=_keep_index)


def _tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: tuple[int, int],
    scale: float,
    start: Callable = _window_start,
) -> Tensor:
    b, h, w, n, d = query.shape
    th, tw = (tile if tile < length else length for tile, length in zip(_TILE, (h, w), strict=True))
    keys, bias = plan(_tiled_plan, query, h, w, *kernel, th, tw, query.dtype, query.device, start)

    def halos(x: Tensor) -> Tensor:
        # Tokens first: one gather of whole (B, n, d) rows, and its transpose needs no second copy.
        x = _gather(x.permute(1, 2, 0, 3, 4).reshape(h * w, b * n, d), keys)
        return x.reshape(bias.shape[0], bias.shape[3], b * n, d).transpose(1, 2)

    queries = _split(query, th, tw).permute(1, 3, 0, 5, 2, 4, 6)  # R, C, B, n, th, tw, d
    r, c = queries.shape[:2]
    # Tiles are the batch and (B, n) the heads, so that one mask per tile broadcasts over everything else.
    queries = queries.reshape(r * c, b * n, th * tw, d)
    out = F.scaled_dot_product_attention(queries, halos(key), halos(value), attn_mask=bias, scale=scale)
    out = out.reshape(r, c, b, n, th, tw, d).permute(2, 0, 4, 1, 5, 3, 6).reshape(b, r * th, c * tw, n, d)
    return out[:, :h, :w]


# ---- flex ----


def _axis_blocks(length: int, kernel: int, tile: int, device: torch.device) -> tuple[Tensor, ...]:
    """Along one axis, the first tile of keys that each tile of queries sees and their number; then the converse."""
    first = torch.arange(-(-length // tile), device=device) * tile
    lowest = _window_start(first, kernel, length) // tile
    highest = (_window_start(first + tile - 1, kernel, length) + kernel - 1) // tile
    tiles = first // tile
    first_seen_by = torch.searchsorted(highest, tiles)
    return lowest, highest - lowest + 1, first_seen_by, torch.searchsorted(lowest, tiles, right=True) - first_seen_by


def _block_lists(first_row: Tensor, rows: Tensor, first_col: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Number `(1, 1, T)` and flat indices `(1, 1, T, T)`, that many of them valid, of rectangles of tiles."""
    r, c = rows.shape[0], cols.shape[0]
    slot = torch.arange(r * c, device=rows.device)
    row = first_row[:, None, None] + slot // cols[None, :, None]
    col = first_col[None, :, None] + slot % cols[None, :, None]
    index = (row * c + col).clamp(max=r * c - 1)
    return (rows[:, None] * cols).view(1, 1, -1).int(), index.view(1, 1, r * c, r * c).int()


def _flex_plan(h: int, w: int, kh: int, kw: int, th: int, tw: int, device: torch.device):
    """Block mask over tokens in tile order. Padded keys lie behind the last window, so no query sees them."""
    from torch.nn.attention.flex_attention import BlockMask

    first_row, rows, first_row_seen_by, rows_seen_by = _axis_blocks(h, kh, th, device)
    first_col, cols, first_col_seen_by, cols_seen_by = _axis_blocks(w, kw, tw, device)
    r, c = rows.shape[0], cols.shape[0]
    keys = _block_lists(first_row, rows, first_col, cols)
    queries = _block_lists(first_row_seen_by, rows_seen_by, first_col_seen_by, cols_seen_by)

    row = torch.arange(r * th, device=device).view(r, 1, th, 1).expand(r, c, th, tw).flatten()
    col = torch.arange(c * tw, device=device).view(1, c, 1, tw).expand(r, c, th, tw).flatten()
    start_row, start_col = _window_start(row, kh, h), _window_start(col, kw, w)

    # Looking coordinates up is cheaper than dividing for them at every score.
    def sees(batch, head, q, k):
        y, x = row[k] - start_row[q], col[k] - start_col[q]
        return (y >= 0) & (y < kh) & (x >= 0) & (x < kw)

    # Not `from_kv_blocks`, which finds the converse lists with a vmap that fails inside an opaque operator.
    return BlockMask(
        (row.shape[0],) * 2, *keys, None, None, *queries, None, None, BLOCK_SIZE=(th * tw,) * 2, mask_mod=sees
    )


_compiled_flex_attention: Callable | None = None


def _flex(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float) -> Tensor:
    global _compiled_flex_attention
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling() and query.device.type == "cpu":
        return _opaque_flex(query, key, value, *kernel, scale)
    b, h, w, n, d = query.shape
    th, tw = _FLEX_TILES[query.device.type]
    mask = plan(_flex_plan, query, h, w, *kernel, th, tw, query.device)
    attend = flex_attention
    if not torch.compiler.is_compiling():
        if _compiled_flex_attention is None:
            # Symbolic sizes do not compile on the CPU. Where PyTorch's limit of recompilations is reached, an error
            # is better than the uncompiled fallback, which stores all scores.
            _compiled_flex_attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        attend = _compiled_flex_attention

    if not torch.is_grad_enabled():
        # On the CPU, leaves that require a gradient are refused even where none is computed.
        query, key, value = query.detach(), key.detach(), value.detach()
    query, key, value = (_split(x, th, tw).permute(0, 5, 1, 3, 2, 4, 6) for x in (query, key, value))
    r, c = query.shape[2:4]
    query, key, value = (x.reshape(b, n, r * c * th * tw, d) for x in (query, key, value))
    out = attend(query, key, value, block_mask=mask, scale=scale)
    out = out.reshape(b, n, r, c, th, tw, d).permute(0, 2, 4, 3, 5, 1, 6).reshape(b, r * th, c * tw, n, d)
    return out[:, :h, :w]


@torch.library.custom_op(f"{_OPERATORS}::flex_neighborhood_attention", mutates_args=())
def _opaque_flex(query: Tensor, key: Tensor, value: Tensor, kh: int, kw: int, scale: float) -> Tensor:
    """`_flex` as one node of a traced graph: on the CPU, FlexAttention does not compile next to other operations."""
    return _flex(query, key, value, (kh, kw), scale).contiguous()


@_opaque_flex.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, kh: int, kw: int, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def _flex_problem(device_type: str, dtype: torch.dtype, head_dim: int, training: bool) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"FlexAttention is used on CPU and CUDA only, not on {device_type!r}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"FlexAttention computes in float32, float16 or bfloat16, not in {dtype}"
    if device_type == "cpu" and training:
        return "FlexAttention has no backward pass on the CPU"
    if device_type == "cuda" and head_dim < 16:
        return f"FlexAttention needs heads of at least 16 channels on CUDA, not {head_dim}"
    if head_dim & (head_dim - 1) and _flex_wants_powers_of_two():
        return f"FlexAttention of this PyTorch needs heads whose channels are a power of two, not {head_dim}"
    return _flex_toolchain_problem(device_type) or None


@torch.compiler.assume_constant_result
def _flex_wants_powers_of_two() -> bool:
    from torch.nn.attention import flex_attention

    return hasattr(flex_attention, "_supported_head_dim")  # torch 2.6 to the first without the limit


@torch.compiler.assume_constant_result
def _flex_toolchain_problem(device_type: str) -> str:
    if device_type == "cuda":
        return (
            "" if importlib.util.find_spec("triton") else "FlexAttention on CUDA needs Triton, which is not installed"
        )
    if sys.platform == "darwin" or "AVX2" not in torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX2"):
        return "FlexAttention on the CPU needs an x86 processor with AVX2"
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    return (
        "" if shutil.which(compiler) else f"FlexAttention on the CPU needs a C++ compiler, and {compiler!r} is missing"
    )


# ---- natten ----


def _natten(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float) -> Tensor:
    import natten  # optional: Diffusers asks for whatever `import x` it finds in a repository's code, but for such lines

    return natten.na2d(query.contiguous(), key.contiguous(), value.contiguous(), kernel_size=kernel, scale=scale)


def _natten_problem(
    device_type: str, dtype: torch.dtype, head_dim: int, training: bool, kernel: tuple[int, int] | None
) -> str | None:
    if device_type != "cuda":
        return f"NATTEN's kernels run on CUDA, not on {device_type!r}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"NATTEN computes in float32, float16 or bfloat16, not in {dtype}"
    if head_dim % 8 != 0:
        return f"NATTEN needs heads whose channels are a multiple of 8, not {head_dim}"
    if kernel is not None and min(kernel) < 2:
        return f"NATTEN needs windows of at least 2 tokens along each axis, not {kernel}"
    problem, version = _natten_library()
    if not problem and training and version < _NATTEN_TRAINS_SINCE:
        wanted, found = (".".join(map(str, v)) for v in (_NATTEN_TRAINS_SINCE, version))
        return f"training needs NATTEN {wanted} or later (older gradients can be NaN), found {found}"
    return problem or None


_natten_answer: tuple[str, tuple[int, ...]] | None = None


@torch.compiler.assume_constant_result
def _natten_library() -> tuple[str, tuple[int, ...]]:
    """What is wrong with the installed NATTEN (empty if nothing), and its version; looked up once."""
    global _natten_answer
    if _natten_answer is None:
        _natten_answer = _find_natten()
    return _natten_answer


def _find_natten() -> tuple[str, tuple[int, ...]]:
    if importlib.util.find_spec("natten") is None:
        return "NATTEN is not installed", ()
    try:
        import natten  # see above
    except Exception as error:  # a library built for another PyTorch or CUDA fails in many ways
        return f"NATTEN is installed but does not import ({error})", ()
    if not getattr(natten, "HAS_LIBNATTEN", False):
        return "NATTEN is installed without its compiled library", ()
    release = natten.__version__.split("+")[0].split(".")[:3]
    return "", tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release)


# ---- kernels of our own ----

_OWN_KERNELS = ("triton", "cpp")


def _own_kernels(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: tuple[int, int],
    scale: float,
    norm: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    # By name: the module has been imported to see whether it can run, and a traced graph must not import.
    attend = getattr(torch.ops.diffusers_hdit, f"{name}_neighborhood_attention")
    cos, sin = (None, None) if rotary is None else (table.float().contiguous() for table in rotary)
    return attend(query, key, value, norm, cos, sin, *kernel, scale)[0]


# ---- triton ----


def _triton(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float) -> Tensor:
    if scale <= 0:  # the kernels scale after they have looked for the largest score
        query, scale = query * (-1 if scale else 0), -scale or 1.0
    return _own_kernels("triton", query, key, value, kernel, scale)


def _triton_problem(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"its kernels run on CUDA, not on {device_type!r}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels compute in float32, float16 or bfloat16, not in {dtype}"
    if head_dim not in (16, 32, 64, 128):
        return f"its kernels are for heads of 16, 32, 64 or 128 channels, not {head_dim}"
    problem, interpreted = _triton_kernels()
    if device_type == "cpu" and not (problem or interpreted):
        return "its kernels run on CUDA, not on 'cpu' (but for tests, in Triton's interpreter: TRITON_INTERPRET=1)"
    return problem or None


_triton_answer: tuple[str, bool] | None = None


@torch.compiler.assume_constant_result
def _triton_kernels() -> tuple[str, bool]:
    """Why the kernels cannot be imported (empty if they can), and whether Triton interprets them; looked up once."""
    global _triton_answer
    if _triton_answer is None:
        _triton_answer = _import_triton_kernels()
    return _triton_answer


def _import_triton_kernels() -> tuple[str, bool]:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed", False
    try:
        return "", package_module("ops.triton.neighborhood").INTERPRETED
    except ImportError as error:  # no package around the code of a repository, or a Triton that is broken
        return f"its kernels do not import ({error})", False


# ---- cpp ----


def _cpp(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float) -> Tensor:
    return _own_kernels("cpp", query, key, value, kernel, scale)


def _cpp_problem(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"its kernels run on the CPU, not on {device_type!r}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels are for float32, float16 and bfloat16, not for {dtype}"
    return library_problem() or None


# ---- dense ----


def whole_grid_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Every token sees every other one that the boolean `mask (h * w, h * w)` allows; all `(B, h, w, n, d)`."""
    h, w = query.shape[1:3]
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, (h, w))


def _dense(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float) -> Tensor:
    def sees(length: int, k: int) -> Tensor:
        index = torch.arange(length, device=query.device)
        offset = index - _window_start(index, k, length)[:, None]
        return (offset >= 0) & (offset < k)

    h, w = query.shape[1:3]
    mask = sees(h, kernel[0])[:, None, :, None] & sees(w, kernel[1])[None, :, None, :]
    return whole_grid_attention(query, key, value, scale, mask.reshape(h * w, h * w))


def _whole_grid(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float) -> Tensor:
    return whole_grid_attention(query, key, value, scale)


_IMPLEMENTATIONS = {
    "natten": _natten,
    "triton": _triton,
    "cpp": _cpp,
    "tiled": _tiled,
    "flex": _flex,
    "dense": _dense,
    "whole grid": _whole_grid,
}
