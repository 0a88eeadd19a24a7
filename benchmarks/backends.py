"""Neighborhood attention alone: every backend, and what NATTEN itself does, against the one that "auto" takes."""

import math
from importlib import util

import torch
from measure import Bench, Samples, Table, copy_bandwidth, free_memory
from torch import Tensor

from diffusers_hdit.ops.neighborhood_attention import BACKENDS, neighborhood_attention, unavailable_reason


KERNEL, HEADS, HEAD_DIM = 7, 2, 64


def inputs(bench: Bench, batch: int, side: int, train: bool) -> list[Tensor]:
    shape = (batch, side, side, HEADS, HEAD_DIM)
    return [torch.randn(shape, device=bench.device, dtype=bench.dtype, requires_grad=train) for _ in range(3)]


def attention_call(bench: Bench, attend, batch: int, side: int, train: bool):
    size = 3 * batch * side**2 * HEADS * HEAD_DIM * bench.dtype.itemsize
    tensors = bench.rotating(lambda: inputs(bench, batch, side, train), size)

    def call():
        query_key_value = next(tensors)
        with torch.set_grad_enabled(train):
            out = attend(*query_key_value)
        if train:
            torch.autograd.grad(out, query_key_value, out)

    return call


def natten_itself(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    import natten

    return natten.na2d(query, key, value, kernel_size=(KERNEL, KERNEL), scale=1.0)


def candidates(bench: Bench, train: bool) -> tuple[dict, dict[str, str]]:
    """Functions by name; for those that can't run here, why."""
    functions, reasons = {}, {}
    for name in ("auto", *BACKENDS):
        reason = None if name == "auto" else unavailable_reason(
            name, device=bench.device, dtype=bench.dtype, head_dim=HEAD_DIM, training=train, kernel_size=(KERNEL, KERNEL)
        )  # fmt: skip
        if reason is None:

            def attend(query, key, value, backend=name):
                return neighborhood_attention(query, key, value, KERNEL, scale=1.0, backend=backend)

            functions[name] = attend
        else:
            reasons[name] = reason
    if util.find_spec("natten") is None:
        reasons["na2d of NATTEN"] = "NATTEN is not installed; benchmarks/README.md says how to."
    elif train and bench.device.type == "cpu":
        reasons["na2d of NATTEN"] = "no backward pass on a CPU."
    else:
        functions["na2d of NATTEN"] = natten_itself
    return functions, reasons


def dense_bytes(bench: Bench, batch: int, side: int, train: bool) -> int:
    """What scores and probabilities of all pairs of tokens, and the mask, take."""
    return side**4 * (batch * HEADS * bench.dtype.itemsize * (4 if train else 2) + 1 + bench.dtype.itemsize)


def backends_table(bench: Bench) -> Table:
    if bench.quick:
        batch, sides = 1, (16, 32)
    else:
        batch, sides = 1 if bench.device.type == "cpu" else 8, (16, 32, 64, 128, 256)
    bandwidth = copy_bandwidth(bench)
    table = Table(
        "backends",
        f"Neighborhood attention, {KERNEL}×{KERNEL}, batch {batch}, {HEADS} heads of {HEAD_DIM}, {bench.dtype}",
        [
            "tokens", "backend", "forward, ms", "over auto", "GB/s", "of its floor", "forward + backward, ms", "over auto"
        ],
        notes=[
            "Ratios are medians of the ratios of rounds in which all backends take turns. GB/s: query, key and value read "
            "once and the output written once, by the forward pass. Its floor is the time of moving as many bytes by "
            f"copies, {bandwidth / 1e9:.1f} GB/s in this run; 100% would be as fast."
        ],
    )  # fmt: skip
    last: dict[tuple[str, bool], float] = {}
    for side in sides:
        results: dict[str, dict[bool, object]] = {name: {} for name in candidates(bench, False)[0]}
        for train in (False, True):
            functions, reasons = candidates(bench, train)
            for name, reason in reasons.items():
                if f"{name}: {reason}" not in table.notes:
                    table.notes.append(f"{name}: {reason}")
            calls = {}
            for name, attend in functions.items():
                # Without its library, which needs CUDA, NATTEN computes all scores.
                quadratic = name == "dense" or (name == "na2d of NATTEN" and bench.device.type == "cpu")
                why = too_much(bench, last.get((name, train)), batch, side, train, quadratic)
                if why is None:
                    call = attention_call(bench, attend, batch, side, train)
                    last[name, train] = bench.once(call)
                    if last[name, train] <= bench.limit:
                        calls[name] = call
                        continue
                    why = f"{last[name, train]:.1f} s, one cold call"
                last[name, train] = math.inf if why.startswith("not run") else last[name, train]
                results[name][train] = why
            for name, times in bench.turns(calls, bench.seconds).items():
                results[name][train] = times
            calls.clear()
        # FlexAttention compiles for each size and mode, and PyTorch for so many only.
        bench.forget()
        moved = 4 * batch * side**2 * HEADS * HEAD_DIM * bench.dtype.itemsize
        for name, by_mode in results.items():
            cells = []
            for train in (False, True):
                time, auto = by_mode.get(train), results["auto"].get(train)
                both = name != "auto" and isinstance(time, Samples) and isinstance(auto, Samples)
                cells += [time, time.over(auto) if both else None]
                if not train:
                    speed = moved / time.median if isinstance(time, Samples) else None
                    cells += [speed and speed / 1e9, speed and f"{speed / bandwidth:.0%}"]
            table.add(f"{side}×{side}", name, *cells)
    return table


def too_much(bench: Bench, last: float | None, batch: int, side: int, train: bool, quadratic: bool) -> str | None:
    """Why a size is left out, from what twice as short a side took."""
    if quadratic and dense_bytes(bench, batch, side, train) > free_memory(bench.device) / 2:
        return f"not run: {dense_bytes(bench, batch, side, train) / 2**30:.0f} GiB of scores"
    if last == math.inf:
        return "not run"
    seconds = 0 if last is None else last * (16 if quadratic else 4)
    return f"not run: {seconds:.0f} s by the size before" if seconds > 4 * bench.limit else None
