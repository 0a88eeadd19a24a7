"""Neighborhood attention as Triton kernels: no halo is ever written to memory, forward or backward.

The softmax over the blocks of a halo is that of Dao et al. 2022, "FlashAttention", https://arxiv.org/abs/2205.14135
(algorithm 1; the backward pass recomputes the weights from the saved log-sum-exp, algorithm 4). The windows are those
of `ops/neighborhood_attention.py`, which calls this. It is imported only where Triton is installed.

Queries and keys that are not yet normalized and rotated (`normalize_and_rotate`) are so when they are loaded, and their
gradients go the same way back before they are stored.

Shapes:
    B batch              h, w grid of tokens        n heads         d channels of a head
    kh, kw window        tile: TH x TW tokens       block: BH x BW tokens of the halo, taken at once
    PAIRS of channels of a head are rotated (0: none; -1: nothing is normalized either); PW, RW: channels of a half of the
    pairs, and of the rest, padded to what a matrix product takes
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from ..operators import make_operators


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
def _offsets(row, column, stride_y, stride_x, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """Where channels FIRST to FIRST + COUNT of tokens are, WIDE of them, and which of these exist."""
    channel = tl.arange(0, WIDE)
    offset = (row * stride_y + column * stride_x)[:, None] + FIRST + channel[None, :]
    exists = inside[:, None]
    if COUNT < WIDE:
        exists = exists & (channel < COUNT)[None, :]
    return offset, exists


@triton.jit
def _load(
    pointer, row, column, stride_y, stride_x, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr
):
    """Channels of the tokens `(rows * columns, WIDE)` from `pointer` on, zero where there are none."""
    offset, exists = _offsets(row, column, stride_y, stride_x, inside, FIRST, COUNT, WIDE)
    return tl.load(pointer + offset, mask=exists, other=0.0)


@triton.jit
def _store(
    pointer, x, row, column, stride_y, stride_x, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr
):
    offset, exists = _offsets(row, column, stride_y, stride_x, inside, FIRST, COUNT, WIDE)
    tl.store(pointer + offset, x.to(pointer.dtype.element_ty), mask=exists)


# ---- Queries and keys, in three parts: first and second channels of the pairs that are turned, and the rest ----


@triton.jit
def _load_parts(
    pointer, row, column, stride_y, stride_x, inside, D: tl.constexpr, PAIRS: tl.constexpr, PW: tl.constexpr,
    RW: tl.constexpr,
):  # fmt: skip
    """As they are stored. Without pairs, the rest is all, and stands for the other parts."""
    if PAIRS > 0:
        first = _load(pointer, row, column, stride_y, stride_x, inside, 0, PAIRS, PW)
        second = _load(pointer, row, column, stride_y, stride_x, inside, PAIRS, PAIRS, PW)
        rest = _load(pointer, row, column, stride_y, stride_x, inside, 2 * PAIRS, D - 2 * PAIRS, RW)
    else:
        rest = _load(pointer, row, column, stride_y, stride_x, inside, 0, D, RW)
        first, second = rest, rest
    return first, second, rest


@triton.jit
def _load_angles(cos, sin, y, x, w, heads, head, inside, PAIRS: tl.constexpr, PW: tl.constexpr):
    """Cosines and sines at the places y, x, of tables `(h, w, n, PAIRS)`."""
    at = ((y * w + x) * heads + head) * PAIRS
    return _load(cos, at, at, 1, 0, inside, 0, PAIRS, PW), _load(sin, at, at, 1, 0, inside, 0, PAIRS, PW)


@triton.jit
def _product(a, b, c, x, y, z, PAIRS: tl.constexpr):
    """Of each token's a, b, c with its x, y, z."""
    product = tl.sum(c * z, 1)
    if PAIRS > 0:
        product += tl.sum(a * x + b * y, 1)
    return product


@triton.jit
def _load_ready(
    pointer, row, column, stride_y, stride_x, inside, y, x, norm, cos, sin, w, heads, head,
    D: tl.constexpr, PAIRS: tl.constexpr, PW: tl.constexpr, RW: tl.constexpr,
):  # fmt: skip
    """The parts of the tokens at the places y, x of the grid, normalized and rotated in float32, rounded once."""
    first, second, rest = _load_parts(pointer, row, column, stride_y, stride_x, inside, D, PAIRS, PW, RW)
    if PAIRS >= 0:
        a, b, c = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
        factor = (tl.load(norm + head) * tl.rsqrt(_product(a, b, c, a, b, c, PAIRS) + 1e-6))[:, None]
        rest = (c * factor).to(rest.dtype)
        if PAIRS > 0:
            cosine, sine = _load_angles(cos, sin, y, x, w, heads, head, inside, PAIRS, PW)
            a, b = a * factor, b * factor
            first, second = (a * cosine - b * sine).to(first.dtype), (b * cosine + a * sine).to(first.dtype)
    return first, second, rest


@triton.jit
def _scores(a, b, c, x, y, z, PAIRS: tl.constexpr):
    """Products `(rows, columns)` of the tokens with parts a, b, c and x, y, z."""
    scores = _dot(c, tl.trans(z))
    if PAIRS > 0:
        scores += _dot(a, tl.trans(x)) + _dot(b, tl.trans(y))
    return scores


@triton.jit
def _add_up(weights, x, y, z, a, b, c, PAIRS: tl.constexpr):
    """The sums a, b, c plus weights times the tokens with parts x, y, z."""
    weights = weights.to(z.dtype)
    if PAIRS > 0:
        a += _dot(weights, x)
        b += _dot(weights, y)
    return a, b, c + _dot(weights, z)


@triton.jit
def _store_gradient(
    to, to_y, to_x, a, b, c, pointer, row, column, stride_y, stride_x, inside, y, x, norm, cos, sin, w, heads, head,
    shares, D: tl.constexpr, PAIRS: tl.constexpr, PW: tl.constexpr, RW: tl.constexpr,
):  # fmt: skip
    """Stores at `to` the gradient of what is stored at `pointer`, and this program's share in that of norm; a, b, c are the
    gradient of what `_load_ready` made of it."""
    if PAIRS > 0:
        cosine, sine = _load_angles(cos, sin, y, x, w, heads, head, inside, PAIRS, PW)
        a, b = a * cosine + b * sine, b * cosine - a * sine
    if PAIRS >= 0:
        first, second, rest = _load_parts(pointer, row, column, stride_y, stride_x, inside, D, PAIRS, PW, RW)
        first, second, rest = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
        inverse = tl.rsqrt(_product(first, second, rest, first, second, rest, PAIRS) + 1e-6)
        share = inverse * _product(first, second, rest, a, b, c, PAIRS)
        tl.store(shares + tl.program_id(0), tl.sum(tl.where(inside, share, 0.0)))
        factor, along = (tl.load(norm + head) * inverse)[:, None], (inverse * share)[:, None]
        c = factor * (c - rest * along)
        if PAIRS > 0:
            a, b = factor * (a - first * along), factor * (b - second * along)
    if PAIRS > 0:
        _store(to, a, row, column, to_y, to_x, inside, 0, PAIRS, PW)
        _store(to, b, row, column, to_y, to_x, inside, PAIRS, PAIRS, PW)
        _store(to, c, row, column, to_y, to_x, inside, 2 * PAIRS, D - 2 * PAIRS, RW)
    else:
        _store(to, c, row, column, to_y, to_x, inside, 0, D, RW)


# ---- The kernels ----


@triton.jit
def _forward_kernel(
    query, key, value, norm, cos, sin, out, lse, scale, h, w, heads,
    qb, qy, qx, qn, kb, ky, kx, kn, vb, vy, vx, vn, ob, oy, ox, on,
    KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, PW: tl.constexpr, RW: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """`out` of one tile of queries, and `lse (B, n, h, w)`: log2 of the sums that the softmax divides by."""
    top, left, image, head = _place(h, w, heads, TH, TW)
    token, block = tl.arange(0, TH * TW), tl.arange(0, BH * BW)
    row, column = token // TW, token % TW
    y, x = top + row, left + column
    inside = (y < h) & (x < w)
    q1, q2, q3 = _load_ready(
        _at(query, image, head, top, left, qb, qy, qx, qn), row, column, qy, qx, inside, y, x,
        norm, cos, sin, w, heads, head, D, PAIRS, PW, RW,
    )  # fmt: skip
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
        k1, k2, k3 = _load_ready(
            _at(key, image, head, y0, x0, kb, ky, kx, kn), block // BW, block % BW, ky, kx, exists, key_y, key_x,
            norm, cos, sin, w, heads, head, D, PAIRS, PW, RW,
        )  # fmt: skip
        v = _load(_at(value, image, head, y0, x0, vb, vy, vx, vn), block // BW, block % BW, vy, vx, exists, 0, D, D)
        seen = _sees(y[:, None], x[:, None], key_y[None, :], key_x[None, :], h, w, KH, KW)
        scores = tl.where(seen, _scores(q1, q2, q3, k1, k2, k3, PAIRS), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * log2_scale)
        weights = tl.exp2(scores * log2_scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + _dot(weights.to(v.dtype), v)
        highest = higher
    to = _at(out, image, head, top, left, ob, oy, ox, on)
    _store(to, sums / total[:, None], row, column, oy, ox, inside, 0, D, D)
    plane = lse + (image * heads + head).to(tl.int64) * h * w
    tl.store(plane + y * w + x, highest + tl.log2(total), mask=inside)


@triton.jit
def _query_gradient_kernel(
    query, key, value, norm, cos, sin, out, lse, out_gradient, delta, query_gradient, shares, scale, h, w, heads,
    qb, qy, qx, qn, kb, ky, kx, kn, vb, vy, vx, vn, ob, oy, ox, on, gb, gy, gx, gn,
    KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, PW: tl.constexpr, RW: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Of one tile of queries; and `delta (B, n, h, w)`, the products of outputs with their gradients."""
    top, left, image, head = _place(h, w, heads, TH, TW)
    token, block = tl.arange(0, TH * TW), tl.arange(0, BH * BW)
    row, column = token // TW, token % TW
    y, x = top + row, left + column
    inside = (y < h) & (x < w)
    queries = _at(query, image, head, top, left, qb, qy, qx, qn)
    q1, q2, q3 = _load_ready(
        queries, row, column, qy, qx, inside, y, x, norm, cos, sin, w, heads, head, D, PAIRS, PW, RW
    )  # fmt: skip
    g = _load(_at(out_gradient, image, head, top, left, gb, gy, gx, gn), row, column, gy, gx, inside, 0, D, D)
    o = _load(_at(out, image, head, top, left, ob, oy, ox, on), row, column, oy, ox, inside, 0, D, D)
    product = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    plane = (image * heads + head).to(tl.int64) * h * w
    tl.store(delta + plane + y * w + x, product, mask=inside)
    log_total = tl.load(lse + plane + y * w + x, mask=inside, other=0.0)
    first_y, rows = _keys_seen(top, TH, KH, h)
    first_x, columns = _keys_seen(left, TW, KW, w)

    sums1 = tl.zeros([TH * TW, PW], tl.float32)
    sums2 = tl.zeros([TH * TW, PW], tl.float32)
    sums3 = tl.zeros([TH * TW, RW], tl.float32)
    blocks_x: tl.constexpr = (TW + KW + BW - 2) // BW  # a constant: with one block, its columns stay outside the loop
    for step in range(tl.cdiv(rows, BH) * blocks_x):
        y0, x0 = first_y + step // blocks_x * BH, first_x + step % blocks_x * BW
        key_y, key_x = y0 + block // BW, x0 + block % BW
        exists = (key_y < first_y + rows) & (key_x < first_x + columns)
        k1, k2, k3 = _load_ready(
            _at(key, image, head, y0, x0, kb, ky, kx, kn), block // BW, block % BW, ky, kx, exists, key_y, key_x,
            norm, cos, sin, w, heads, head, D, PAIRS, PW, RW,
        )  # fmt: skip
        v = _load(_at(value, image, head, y0, x0, vb, vy, vx, vn), block // BW, block % BW, vy, vx, exists, 0, D, D)
        seen = _sees(y[:, None], x[:, None], key_y[None, :], key_x[None, :], h, w, KH, KW)
        scores = _scores(q1, q2, q3, k1, k2, k3, PAIRS) * (scale * 1.4426950408889634)
        weights = tl.where(seen, tl.exp2(scores - log_total[:, None]), 0.0)
        score_gradients = weights * (_dot(g, tl.trans(v)) - product[:, None])
        sums1, sums2, sums3 = _add_up(score_gradients, k1, k2, k3, sums1, sums2, sums3, PAIRS)
    _store_gradient(
        _at(query_gradient, image, head, top, left, ob, oy, ox, on), oy, ox, sums1 * scale, sums2 * scale, sums3 * scale,
        queries, row, column, qy, qx, inside, y, x, norm, cos, sin, w, heads, head, shares, D, PAIRS, PW, RW,
    )  # fmt: skip


@triton.jit
def _key_value_gradient_kernel(
    query, key, value, norm, cos, sin, lse, out_gradient, delta, key_gradient, value_gradient, shares, scale, h, w, heads,
    qb, qy, qx, qn, kb, ky, kx, kn, vb, vy, vx, vn, ob, oy, ox, on, gb, gy, gx, gn,
    KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, PW: tl.constexpr, RW: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Of one tile of keys, gathered from the queries that see them: each sum has one order, so runs repeat bit for bit."""
    top, left, image, head = _place(h, w, heads, TH, TW)
    token, block = tl.arange(0, TH * TW), tl.arange(0, BH * BW)
    row, column = token // TW, token % TW
    y, x = top + row, left + column
    inside = (y < h) & (x < w)
    keys = _at(key, image, head, top, left, kb, ky, kx, kn)
    k1, k2, k3 = _load_ready(
        keys, row, column, ky, kx, inside, y, x, norm, cos, sin, w, heads, head, D, PAIRS, PW, RW
    )  # fmt: skip
    v = _load(_at(value, image, head, top, left, vb, vy, vx, vn), row, column, vy, vx, inside, 0, D, D)
    plane = (image * heads + head).to(tl.int64) * h * w
    first_y, rows = _queries_seeing(top, TH, KH, h)
    first_x, columns = _queries_seeing(left, TW, KW, w)

    sums1 = tl.zeros([TH * TW, PW], tl.float32)
    sums2 = tl.zeros([TH * TW, PW], tl.float32)
    sums3 = tl.zeros([TH * TW, RW], tl.float32)
    value_sums = tl.zeros([TH * TW, D], tl.float32)
    blocks_x = tl.cdiv(columns, BW)
    for step in range(tl.cdiv(rows, BH) * blocks_x):
        y0, x0 = first_y + step // blocks_x * BH, first_x + step % blocks_x * BW
        query_y, query_x = y0 + block // BW, x0 + block % BW
        exists = (query_y < first_y + rows) & (query_x < first_x + columns)
        q1, q2, q3 = _load_ready(
            _at(query, image, head, y0, x0, qb, qy, qx, qn), block // BW, block % BW, qy, qx, exists, query_y, query_x,
            norm, cos, sin, w, heads, head, D, PAIRS, PW, RW,
        )  # fmt: skip
        to_g = _at(out_gradient, image, head, y0, x0, gb, gy, gx, gn)
        g = _load(to_g, block // BW, block % BW, gy, gx, exists, 0, D, D)
        log_total = tl.load(lse + plane + query_y * w + query_x, mask=exists, other=0.0)
        product = tl.load(delta + plane + query_y * w + query_x, mask=exists, other=0.0)
        seen = _sees(query_y[None, :], query_x[None, :], y[:, None], x[:, None], h, w, KH, KW) & exists[None, :]
        scores = _scores(k1, k2, k3, q1, q2, q3, PAIRS) * (scale * 1.4426950408889634)  # keys x queries
        weights = tl.where(seen, tl.exp2(scores - log_total[None, :]), 0.0)
        value_sums += _dot(weights.to(g.dtype), g)
        score_gradients = weights * (_dot(v, tl.trans(g)) - product[None, :])
        sums1, sums2, sums3 = _add_up(score_gradients, q1, q2, q3, sums1, sums2, sums3, PAIRS)
    _store_gradient(
        _at(key_gradient, image, head, top, left, ob, oy, ox, on), oy, ox, sums1 * scale, sums2 * scale, sums3 * scale,
        keys, row, column, ky, kx, inside, y, x, norm, cos, sin, w, heads, head, shares, D, PAIRS, PW, RW,
    )  # fmt: skip
    to = _at(value_gradient, image, head, top, left, ob, oy, ox, on)
    _store(to, value_sums, row, column, oy, ox, inside, 0, D, D)


# ---- Launching ----


def launch_options(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Block of the halo and warps of a program, chosen by what ptxas says for sm_90; no speed was measured."""
    # Two rows of 16 keys: a 7 x 7 window's halo of 14 rows is 7 blocks, none of it in vain but two columns.
    if dtype == torch.float32:
        return {"BH": 1, "BW": 16, "num_warps": 16 if head_dim == 128 else 8, "num_stages": 2}
    return {"BH": 2, "BW": 16, "num_warps": 8 if head_dim == 128 else 4, "num_stages": 2}


def part_sizes(head_dim: int, pairs: int) -> dict[str, int]:
    """PAIRS, PW and RW: powers of two, and at least 16."""
    rotated = max(pairs, 0)
    wide = {"PW": rotated, "RW": head_dim - 2 * rotated}
    return {"PAIRS": pairs} | {name: max(16, triton.next_power_of_2(count)) for name, count in wide.items()}


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch, row, column and head."""
    return [stride for x in tensors for stride in x.stride()[:4]]


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles(query: Tensor) -> int:
    return triton.cdiv(query.shape[1], _TILE[0]) * triton.cdiv(query.shape[2], _TILE[1])


def _launch(
    kernel, tensors: tuple, strided: tuple, norm: Tensor | None, cos: Tensor | None, kh: int, kw: int, scale: float
) -> None:
    query = tensors[0]
    b, h, w, n, d = query.shape
    pairs = -1 if norm is None else 0 if cos is None else cos.shape[-1]
    sizes = {"KH": kh, "KW": kw, "D": d, **part_sizes(d, pairs), "TH": _TILE[0], "TW": _TILE[1]}
    tensors = [query if x is None else x for x in tensors]  # a pointer that is not read
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        kernel[(b * n * _tiles(query),)](
            *tensors, scale, h, w, n, *_strides(*strided), **sizes, **launch_options(query.dtype, d)
        )


def _forward(query, key, value, norm, cos, sin, kh, kw, scale) -> tuple[Tensor, Tensor]:
    query, key, value = map(_dense_channels, (query, key, value))
    b, h, w, n, d = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((b, n, h, w), dtype=torch.float32, device=query.device)
    tensors = (query, key, value, norm, cos, sin, out, lse)
    _launch(_forward_kernel, tensors, (query, key, value, out), norm, cos, kh, kw, scale)
    return out, lse


def _backward(gradient, query, key, value, norm, cos, sin, out, lse, kh, kw, scale) -> tuple[Tensor, ...]:
    gradient, query, key, value = map(_dense_channels, (gradient, query, key, value))
    gradients = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)]
    delta = torch.empty_like(lse)
    b, n = lse.shape[:2]
    # Of queries and keys, each image and head, each tile: summed up in one order, so runs repeat bit for bit.
    shares = lse.new_empty(0 if norm is None else (2, b, n, _tiles(query)))
    of_queries, of_keys = (None, None) if norm is None else shares
    given, strided = (query, key, value, norm, cos, sin), (query, key, value, out, gradient)
    by_query = (*given, out, lse, gradient, delta, gradients[0], of_queries)
    _launch(_query_gradient_kernel, by_query, strided, norm, cos, kh, kw, scale)
    by_key = (*given, lse, gradient, delta, *gradients[1:], of_keys)  # delta is there now
    _launch(_key_value_gradient_kernel, by_key, strided, norm, cos, kh, kw, scale)
    return *gradients, shares if norm is None else shares.sum((0, 1, 3))


attend, attend_backward = make_operators("triton", _forward, _backward)
