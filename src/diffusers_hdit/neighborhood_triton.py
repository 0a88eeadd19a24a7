"""Neighborhood attention as Triton kernels: no halo is ever written to memory, forward or backward.

The softmax over the blocks of a halo is that of Dao et al. 2022, "FlashAttention", https://arxiv.org/abs/2205.14135
(algorithm 1; the backward pass recomputes the weights from the saved log-sum-exp, algorithm 4). The windows are those
of `neighborhood.py`, which calls this. Imported only where the backend is used: it needs Triton.

Shapes:
    B batch              h, w grid of tokens        n heads         d channels of a head
    kh, kw window        tile: TH x TW tokens       block: BH x BW tokens of the halo, taken at once
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction


HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_TILE = (8, 8)  # 64 rows: what one warp group of sm_90 multiplies at once


@triton.jit
def _window_start(index, kernel: tl.constexpr, length):
    return tl.minimum(tl.maximum(index - kernel // 2, 0), length - kernel)


# With TRITON_INTERPRET=1 set before Triton is imported, its decorator makes functions that NumPy runs on the CPU.
INTERPRETED = not isinstance(_window_start, JITFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b):
    if _INTERPRETED:  # it takes the bits of bfloat16 for integers; products of widened numbers are exact either way
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _place(h, w, heads, TH: tl.constexpr, TW: tl.constexpr):
    """First row and column of this program's tile, its image and its head."""
    tiles_x = tl.cdiv(w, TW)
    tiles = tl.cdiv(h, TH) * tiles_x
    tile, image = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    return tile // tiles_x * TH, tile % tiles_x * TW, image // heads, image % heads


@triton.jit
def _keys_seen(first, tile: tl.constexpr, kernel: tl.constexpr, length):
    """Along one axis: the first key that a tile of queries sees, and how many."""
    start = _window_start(first, kernel, length)
    return start, _window_start(tl.minimum(first + tile, length) - 1, kernel, length) + kernel - start


@triton.jit
def _queries_seeing(first, tile: tl.constexpr, kernel: tl.constexpr, length):
    """Along one axis: the first query that sees a key of a tile, and how many until the last that does."""
    # The first and last `kernel` keys are also seen by the queries whose windows were moved inside the grid.
    last = tl.minimum(first + tile, length) - 1
    start = tl.where(first < kernel, 0, first - kernel // 2)
    return start, tl.where(last >= length - kernel, length - 1, last + kernel // 2) - start + 1


@triton.jit
def _sees(query_y, query_x, key_y, key_x, h, w, KH: tl.constexpr, KW: tl.constexpr):
    """Whether queries see keys; coordinates are shaped so that they broadcast against each other."""
    y = key_y - _window_start(query_y, KH, h)
    x = key_x - _window_start(query_x, KW, w)
    return (y >= 0) & (y < KH) & (x >= 0) & (x < KW)


@triton.jit
def _at(pointer, image, head, y, x, stride_b, stride_y, stride_x, stride_n):
    """Pointer to channel 0 of one token; 64 bits, so that only distances inside a halo must fit 32."""
    return pointer + image.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + x * stride_x + head * stride_n


@triton.jit
def _load(pointer, row, column, stride_y, stride_x, inside, D: tl.constexpr):
    """Tokens `(rows * columns, D)` from `pointer` on, zero where not `inside`."""
    offset = (row * stride_y + column * stride_x)[:, None] + tl.arange(0, D)[None, :]
    return tl.load(pointer + offset, mask=inside[:, None], other=0.0)


@triton.jit
def _store(pointer, x, row, column, stride_y, stride_x, inside, D: tl.constexpr):
    offset = (row * stride_y + column * stride_x)[:, None] + tl.arange(0, D)[None, :]
    tl.store(pointer + offset, x.to(pointer.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _forward_kernel(
    query, key, value, out, lse, scale, h, w, heads,
    qb, qy, qx, qn, kb, ky, kx, kn, vb, vy, vx, vn, ob, oy, ox, on,
    KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """`out` of one tile of queries, and `lse (B, n, h, w)`: log2 of the sums that the softmax divides by."""
    top, left, image, head = _place(h, w, heads, TH, TW)
    token, block = tl.arange(0, TH * TW), tl.arange(0, BH * BW)
    row, column = token // TW, token % TW
    y, x = top + row, left + column
    inside = (y < h) & (x < w)
    q = _load(_at(query, image, head, top, left, qb, qy, qx, qn), row, column, qy, qx, inside, D)
    first_y, rows = _keys_seen(top, TH, KH, h)
    first_x, columns = _keys_seen(left, TW, KW, w)

    log2_scale = scale * 1.4426950408889634
    highest = tl.full([TH * TW], -3.0e38, tl.float32)  # finite: a block in which a query sees nothing makes no NaN
    total = tl.zeros([TH * TW], tl.float32)
    sums = tl.zeros([TH * TW, D], tl.float32)
    blocks_x: tl.constexpr = (TW + KW + BW - 2) // BW  # a constant: with one block, its columns stay outside the loop
    for step in range(tl.cdiv(rows, BH) * blocks_x):
        y0, x0 = first_y + step // blocks_x * BH, first_x + step % blocks_x * BW
        key_y, key_x = y0 + block // BW, x0 + block % BW
        exists = (key_y < first_y + rows) & (key_x < first_x + columns)
        k = _load(_at(key, image, head, y0, x0, kb, ky, kx, kn), block // BW, block % BW, ky, kx, exists, D)
        v = _load(_at(value, image, head, y0, x0, vb, vy, vx, vn), block // BW, block % BW, vy, vx, exists, D)
        seen = _sees(y[:, None], x[:, None], key_y[None, :], key_x[None, :], h, w, KH, KW)
        scores = tl.where(seen, _dot(q, tl.trans(k)), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * log2_scale)
        weights = tl.exp2(scores * log2_scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + _dot(weights.to(v.dtype), v)
        highest = higher
    _store(_at(out, image, head, top, left, ob, oy, ox, on), sums / total[:, None], row, column, oy, ox, inside, D)
    plane = lse + (image * heads + head).to(tl.int64) * h * w
    tl.store(plane + y * w + x, highest + tl.log2(total), mask=inside)


@triton.jit
def _query_gradient_kernel(
    query, key, value, out, lse, out_gradient, delta, query_gradient, scale, h, w, heads,
    qb, qy, qx, qn, kb, ky, kx, kn, vb, vy, vx, vn, ob, oy, ox, on, gb, gy, gx, gn,
    KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Of one tile of queries; and `delta (B, n, h, w)`, the products of outputs with their gradients."""
    top, left, image, head = _place(h, w, heads, TH, TW)
    token, block = tl.arange(0, TH * TW), tl.arange(0, BH * BW)
    row, column = token // TW, token % TW
    y, x = top + row, left + column
    inside = (y < h) & (x < w)
    q = _load(_at(query, image, head, top, left, qb, qy, qx, qn), row, column, qy, qx, inside, D)
    g = _load(_at(out_gradient, image, head, top, left, gb, gy, gx, gn), row, column, gy, gx, inside, D)
    o = _load(_at(out, image, head, top, left, ob, oy, ox, on), row, column, oy, ox, inside, D)
    product = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    plane = (image * heads + head).to(tl.int64) * h * w
    tl.store(delta + plane + y * w + x, product, mask=inside)
    log_total = tl.load(lse + plane + y * w + x, mask=inside, other=0.0)
    first_y, rows = _keys_seen(top, TH, KH, h)
    first_x, columns = _keys_seen(left, TW, KW, w)

    sums = tl.zeros([TH * TW, D], tl.float32)
    blocks_x: tl.constexpr = (TW + KW + BW - 2) // BW  # a constant: with one block, its columns stay outside the loop
    for step in range(tl.cdiv(rows, BH) * blocks_x):
        y0, x0 = first_y + step // blocks_x * BH, first_x + step % blocks_x * BW
        key_y, key_x = y0 + block // BW, x0 + block % BW
        exists = (key_y < first_y + rows) & (key_x < first_x + columns)
        k = _load(_at(key, image, head, y0, x0, kb, ky, kx, kn), block // BW, block % BW, ky, kx, exists, D)
        v = _load(_at(value, image, head, y0, x0, vb, vy, vx, vn), block // BW, block % BW, vy, vx, exists, D)
        seen = _sees(y[:, None], x[:, None], key_y[None, :], key_x[None, :], h, w, KH, KW)
        scores = _dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
        weights = tl.where(seen, tl.exp2(scores - log_total[:, None]), 0.0)
        score_gradients = weights * (_dot(g, tl.trans(v)) - product[:, None])
        sums += _dot(score_gradients.to(k.dtype), k)
    _store(_at(query_gradient, image, head, top, left, ob, oy, ox, on), sums * scale, row, column, oy, ox, inside, D)


@triton.jit
def _key_value_gradient_kernel(
    query, key, value, lse, out_gradient, delta, key_gradient, value_gradient, scale, h, w, heads,
    qb, qy, qx, qn, kb, ky, kx, kn, vb, vy, vx, vn, ob, oy, ox, on, gb, gy, gx, gn,
    KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Of one tile of keys, gathered from the queries that see them: each sum has one order, so runs repeat bit for bit."""
    top, left, image, head = _place(h, w, heads, TH, TW)
    token, block = tl.arange(0, TH * TW), tl.arange(0, BH * BW)
    row, column = token // TW, token % TW
    y, x = top + row, left + column
    inside = (y < h) & (x < w)
    k = _load(_at(key, image, head, top, left, kb, ky, kx, kn), row, column, ky, kx, inside, D)
    v = _load(_at(value, image, head, top, left, vb, vy, vx, vn), row, column, vy, vx, inside, D)
    plane = (image * heads + head).to(tl.int64) * h * w
    first_y, rows = _queries_seeing(top, TH, KH, h)
    first_x, columns = _queries_seeing(left, TW, KW, w)

    key_sums = tl.zeros([TH * TW, D], tl.float32)
    value_sums = tl.zeros([TH * TW, D], tl.float32)
    blocks_x = tl.cdiv(columns, BW)
    for step in range(tl.cdiv(rows, BH) * blocks_x):
        y0, x0 = first_y + step // blocks_x * BH, first_x + step % blocks_x * BW
        query_y, query_x = y0 + block // BW, x0 + block % BW
        exists = (query_y < first_y + rows) & (query_x < first_x + columns)
        q = _load(_at(query, image, head, y0, x0, qb, qy, qx, qn), block // BW, block % BW, qy, qx, exists, D)
        g = _load(_at(out_gradient, image, head, y0, x0, gb, gy, gx, gn), block // BW, block % BW, gy, gx, exists, D)
        log_total = tl.load(lse + plane + query_y * w + query_x, mask=exists, other=0.0)
        product = tl.load(delta + plane + query_y * w + query_x, mask=exists, other=0.0)
        seen = _sees(query_y[None, :], query_x[None, :], y[:, None], x[:, None], h, w, KH, KW) & exists[None, :]
        scores = _dot(k, tl.trans(q)) * (scale * 1.4426950408889634)  # keys x queries
        weights = tl.where(seen, tl.exp2(scores - log_total[None, :]), 0.0)
        value_sums += _dot(weights.to(g.dtype), g)
        score_gradients = weights * (_dot(v, tl.trans(g)) - product[None, :])
        key_sums += _dot(score_gradients.to(q.dtype), q)
    _store(_at(key_gradient, image, head, top, left, ob, oy, ox, on), key_sums * scale, row, column, oy, ox, inside, D)
    _store(_at(value_gradient, image, head, top, left, ob, oy, ox, on), value_sums, row, column, oy, ox, inside, D)


# ---- Launching ----


def launch_options(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Block of the halo and warps of a program, chosen by what ptxas says for sm_90; no speed was measured."""
    # Two rows of 16 keys: a 7 x 7 window's halo of 14 rows is 7 blocks, none of it in vain but two columns.
    if dtype == torch.float32:
        return {"BH": 1, "BW": 16, "num_warps": 16 if head_dim == 128 else 8, "num_stages": 2}
    return {"BH": 2, "BW": 16, "num_warps": 8 if head_dim == 128 else 4, "num_stages": 2}


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch, row, column and head."""
    return [stride for x in tensors for stride in x.stride()[:4]]


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(kernel, tensors: tuple, strided: tuple, query: Tensor, kh: int, kw: int, scale: float) -> None:
    b, h, w, n, d = query.shape
    grid = (b * n * triton.cdiv(h, _TILE[0]) * triton.cdiv(w, _TILE[1]),)
    sizes = {"KH": kh, "KW": kw, "D": d, "TH": _TILE[0], "TW": _TILE[1]}
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        kernel[grid](*tensors, scale, h, w, n, *_strides(*strided), **sizes, **launch_options(query.dtype, d))


# One name for the whole process: unlike `neighborhood.py`, this file is not carried along with saved models.
@torch.library.custom_op("diffusers_hdit::triton_neighborhood_attention", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, kh: int, kw: int, scale: float) -> tuple[Tensor, Tensor]:
    """
    Args:
        query, key, value: `(B, h, w, n, d)`, any strides (channels that are not adjacent are copied), d one of
            `HEAD_DIMS`, a dtype of `DTYPES`.
        kh, kw: window in tokens, odd, at most h and w.
        scale: factor on the scores, positive.

    Returns:
        `(B, h, w, n, d)`, and log2 of the softmax's denominators `(B, n, h, w)` in float32, which has no gradient.
    """
    query, key, value = map(_dense_channels, (query, key, value))
    b, h, w, n, d = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((b, n, h, w), dtype=torch.float32, device=query.device)
    _launch(_forward_kernel, (query, key, value, out, lse), (query, key, value, out), query, kh, kw, scale)
    return out, lse


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, kh: int, kw: int, scale: float) -> tuple[Tensor, Tensor]:
    b, h, w, n, d = query.shape
    return query.new_empty(query.shape), query.new_empty((b, n, h, w), dtype=torch.float32)


@torch.library.custom_op("diffusers_hdit::triton_neighborhood_attention_backward", mutates_args=())
def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kh: int,
    kw: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of `out`; it has no gradient of its own."""
    gradient, query, key, value = map(_dense_channels, (gradient, query, key, value))
    gradients = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)]
    delta = torch.empty_like(lse)
    strided = (query, key, value, out, gradient)
    by_query = (query, key, value, out, lse, gradient, delta, gradients[0])
    _launch(_query_gradient_kernel, by_query, strided, query, kh, kw, scale)
    by_key = (query, key, value, lse, gradient, delta, *gradients[1:])  # delta is there now
    _launch(_key_value_gradient_kernel, by_key, strided, query, kh, kw, scale)
    return tuple(gradients)


@attend_backward.register_fake
def _(gradient, query, key, value, out, lse, kh, kw, scale) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _gradients(ctx, gradient: Tensor, _: Tensor) -> tuple:
    return *attend_backward(gradient, *ctx.saved_tensors, *ctx.options), None, None, None


attend.register_autograd(_gradients, setup_context=_keep)
