"""Backends of neighborhood attention in PyTorch, FlexAttention and NATTEN; see `neighborhood_attention.py`.

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

from .cache import cached_tensors
from .derivatives import differentiable_attention


_TILE = (8, 8)
# The GPU kernels of FlexAttention take up to 128 queries or keys at once and refuse smaller mask blocks.
_FLEX_TILES = {"cpu": (8, 8), "cuda": (8, 16)}
_NATTEN_TRAINS_SINCE = (0, 21, 7)


def _window_start(index: Tensor, kernel: int, length: int) -> Tensor:
    """Return the first key that the query at `index` sees along an axis of `length` tokens."""
    return (index - kernel // 2).clamp(0, length - kernel)


def centred_start(index: Tensor, kernel: int, length: int) -> Tensor:
    """Return the same for a window that stays centred; negative where it reaches over the border."""
    # Queries that only fill up a tile see what the last one sees: a softmax over no keys would be NaN.
    return index.clamp(max=length - 1) - kernel // 2


# Code that is carried by a repository is imported under another name in the same process, and registers its own operators.
_OPERATORS = re.sub("[^0-9A-Za-z_]", "_", __name__)


# ---- tiled ----


def _axis_halos(
    length: int, kernel: int, tile: int, device: torch.device, start: Callable = _window_start
) -> tuple[Tensor, Tensor]:
    """Return the keys `(tiles, halo)` of each tile along an axis, and which of them `(tiles, tile, halo)` each query sees."""
    halo = tile + kernel - 1
    if halo > length:  # not min(): a traced graph keeps the constant for all lengths of one side
        halo = length
    first = torch.arange(-(-length // tile), device=device)[:, None] * tile
    query = first + torch.arange(tile, device=device)
    key = (first - kernel // 2).clamp(0, length - halo) + torch.arange(halo, device=device)
    offset = key[:, None, :] - start(query, kernel, length)[:, :, None]
    return key, (offset >= 0) & (offset < kernel)


def _tile_tensors(
    h: int, w: int, kh: int, kw: int, th: int, tw: int, dtype: torch.dtype, device: torch.device, start: Callable
):
    """Return flat key indices `(T * hh * hw)` and the additive mask `(T, 1, th * tw, hh * hw)`."""
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
    """Split (B, h, w, n, d) into tiles (B, R, th, C, tw, n, d); zeros fill those that reach over the border."""
    h, w = x.shape[1:3]
    if h % th or w % tw:
        x = F.pad(x, (0, 0, 0, 0, 0, -w % tw, 0, -h % th))
    return x.unflatten(2, (-1, tw)).unflatten(1, (-1, th))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows of `x` `(N, ...)` at `index` `(M)`."""
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
    """Add the rows of `x` `(M, ...)` up at `index` into `(length, ...)`: the transpose of `_opaque_gather`."""
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


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: tuple[int, int],
    scale: float,
    start: Callable = _window_start,
) -> Tensor:
    b, h, w, n, d = query.shape
    th, tw = (tile if tile < length else length for tile, length in zip(_TILE, (h, w), strict=True))
    keys, bias = cached_tensors(_tile_tensors, query, h, w, *kernel, th, tw, query.dtype, query.device, start)

    def halos(x: Tensor) -> Tensor:
        # Tokens first: one gather of whole (B, n, d) rows, and its transpose needs no second copy.
        x = _gather(x.permute(1, 2, 0, 3, 4).reshape(h * w, b * n, d), keys)
        return x.reshape(bias.shape[0], bias.shape[3], b * n, d).transpose(1, 2)

    queries = _split(query, th, tw).permute(1, 3, 0, 5, 2, 4, 6)  # R, C, B, n, th, tw, d
    r, c = queries.shape[:2]
    # Tiles are the batch and (B, n) the heads, so that one mask per tile broadcasts over everything else.
    queries = queries.reshape(r * c, b * n, th * tw, d)
    key, value = halos(key), halos(value)
    with differentiable_attention(queries, key, value):
        out = F.scaled_dot_product_attention(queries, key, value, attn_mask=bias, scale=scale)
    out = out.reshape(r, c, b, n, th, tw, d).permute(2, 0, 4, 1, 5, 3, 6).reshape(b, r * th, c * tw, n, d)
    return out[:, :h, :w]


# ---- flex ----


def _axis_blocks(length: int, kernel: int, tile: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return, along an axis, the first tile of keys that each tile of queries sees and their number; then the converse."""
    first = torch.arange(-(-length // tile), device=device) * tile
    lowest = _window_start(first, kernel, length) // tile
    highest = (_window_start(first + tile - 1, kernel, length) + kernel - 1) // tile
    tiles = first // tile
    first_seen_by = torch.searchsorted(highest, tiles)
    return lowest, highest - lowest + 1, first_seen_by, torch.searchsorted(lowest, tiles, right=True) - first_seen_by


def _block_lists(first_row: Tensor, rows: Tensor, first_col: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number `(1, 1, T)` and flat indices `(1, 1, T, T)`, that many of them valid, of rectangles of tiles."""
    r, c = rows.shape[0], cols.shape[0]
    slot = torch.arange(r * c, device=rows.device)
    row = first_row[:, None, None] + slot // cols[None, :, None]
    col = first_col[None, :, None] + slot % cols[None, :, None]
    index = (row * c + col).clamp(max=r * c - 1)
    return (rows[:, None] * cols).view(1, 1, -1).int(), index.view(1, 1, r * c, r * c).int()


def _flex_mask(h: int, w: int, kh: int, kw: int, th: int, tw: int, device: torch.device):
    """Return the block mask over tokens in tile order. Padded keys lie behind the last window, so no query sees them."""
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


def flex_neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float
) -> Tensor:
    global _compiled_flex_attention
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling() and query.device.type == "cpu":
        return _opaque_flex(query, key, value, *kernel, scale)
    b, h, w, n, d = query.shape
    th, tw = _FLEX_TILES[query.device.type]
    mask = cached_tensors(_flex_mask, query, h, w, *kernel, th, tw, query.device)
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
    """Run FlexAttention as one node of a traced graph: on the CPU, FlexAttention does not compile next to other operations."""
    return flex_neighborhood_attention(query, key, value, (kh, kw), scale).contiguous()


@_opaque_flex.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, kh: int, kw: int, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def flex_attention_problem(device_type: str, dtype: torch.dtype, head_dim: int, training: bool) -> str | None:
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


def natten_neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float
) -> Tensor:
    import natten  # optional: Diffusers asks for whatever `import x` it finds in a repository's code, but for such lines

    return natten.na2d(query.contiguous(), key.contiguous(), value.contiguous(), kernel_size=kernel, scale=scale)


def natten_problem(
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
    """Return what is wrong with the installed NATTEN, empty if nothing, and its version; looked up once."""
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


# ---- dense ----


def whole_grid_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attend to all tokens that the boolean `mask (h * w, h * w)` allows; all tensors are `(B, h, w, n, d)`."""
    h, w = query.shape[1:3]
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    with differentiable_attention(query, key, value):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, (h, w))


def dense_attention(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], scale: float) -> Tensor:
    def sees(length: int, k: int) -> Tensor:
        index = torch.arange(length, device=query.device)
        offset = index - _window_start(index, k, length)[:, None]
        return (offset >= 0) & (offset < k)

    h, w = query.shape[1:3]
    mask = sees(h, kernel[0])[:, None, :, None] & sees(w, kernel[1])[None, :, None, :]
    return whole_grid_attention(query, key, value, scale, mask.reshape(h * w, h * w))
