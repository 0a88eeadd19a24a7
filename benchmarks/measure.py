"""What all benchmarks share: timing in turns, the machine's own speed, tables in Markdown and JSON.

A time is the median of several calls, with the middle half of them in brackets. Things that are compared take turns in
every round, each first as often as the other, and a ratio is the median of the ratios of the rounds: a machine that
slows down slows both.
"""

import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

import torch
from torch import Tensor, nn


SOURCE = Path(__file__).parents[1] / "src"


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ----------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass
class Samples:
    """Repeated values of one quantity; `unit` "s" or "x" (a ratio)."""

    values: list[float]
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def middle_half(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def over(self, other: "Samples") -> "Samples":
        """Ratios to another quantity that was measured in the same rounds."""
        return Samples([a / b for a, b in zip(self.values, other.values, strict=True)], "x")

    def per_call(self, count: float) -> "Samples":
        return Samples([value / count for value in self.values], self.unit)

    def __str__(self) -> str:
        scale = 1e3 if self.unit == "s" else 1
        median, low, high = (number(scale * value) for value in (self.median, *self.middle_half))
        return f"{median} ({low} to {high})"


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"


# ----------------------------------------------------------------------------------------------------------------------
# Timing


@dataclass
class Bench:
    """Where and how long to measure: `seconds` a group of things that take turns, `limit` a single call."""

    device: torch.device
    quick: bool = False
    compile_mode: str | None = None
    backend: str = "auto"
    seconds: float = 6.0
    limit: float = 4.0
    least: int = 3
    most: int = 50
    _flush: Tensor | None = field(default=None, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """What networks run in: bfloat16 on a GPU, float32 on a CPU."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def ready(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Random weights, on the device, in `dtype` if given, with the chosen kernel of neighborhood attention."""
        model = randomize(model).to(self.device, dtype)
        if self.backend != "auto" and hasattr(model, "set_neighborhood_backend"):
            model.set_neighborhood_backend(self.backend)
        return model

    def flush(self) -> None:
        """Drives what is left of the last call out of a GPU's level-2 cache (a CPU's is left to rotating inputs)."""
        if self.device.type == "cuda":
            if self._flush is None:
                size = 4 * torch.cuda.get_device_properties(self.device).L2_cache_size
                self._flush = torch.empty(max(size, 2**28), dtype=torch.int8, device=self.device)
            self._flush.zero_()

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call until its result is there."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(self.device)
            return begin.elapsed_time(end) / 1e3
        synchronize(self.device)
        begin = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - begin

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of a call; of the second one, which is warm, unless the first took so long that once is enough."""
        seconds = self.time(call)
        return seconds if seconds > 4 * self.limit else min(seconds, self.time(call))

    def forget(self) -> None:
        """Gives a GPU's memory back, so that the next peak is of what comes next, and drops compiled code."""
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def own_bytes(self) -> int:
        """What `flush` keeps of a GPU's memory."""
        return 0 if self._flush is None else self._flush.nbytes

    def turns(self, calls: dict[str, Callable[[], object]], seconds: float | None = None) -> dict[str, Samples]:
        """Times of calls that take turns, all of them warm."""
        if not calls:
            return {}
        once = sum(self.once(call) for call in calls.values())
        wanted = self.seconds if seconds is None else seconds
        rounds = max(self.least, min(self.most, int(wanted / once)))
        values: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(rounds):
            for name in list(calls) if i % 2 else reversed(list(calls)):
                values[name].append(self.time(calls[name]))
        return {name: Samples(times) for name, times in values.items()}

    def rotating(self, make: Callable[[], object], size: int) -> Iterator:
        """Endlessly one of several random inputs of `size` bytes each, together more than most caches hold."""
        return itertools.cycle([make() for _ in range(max(2, min(16, 2**28 // max(1, size))))])


def copy_bandwidth(bench: Bench) -> float:
    """Bytes a second of copying large tensors, read and written ones counted."""
    size = 2**24 if bench.quick else (2**27 if bench.device.type == "cpu" else 2**30)
    pairs = bench.rotating(lambda: [torch.randn(size // 4, device=bench.device) for _ in range(2)], size)

    def copy():
        target, source = next(pairs)
        target.copy_(source)

    return 2 * size / bench.turns({"copy": copy}, bench.seconds / 4)["copy"].median


def matmul_rate(bench: Bench, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, 2 for a multiply-accumulate, by the library that
    linear layers are given to."""
    from diffusers_hdit.ops.linear import Linear

    side = 512 if bench.quick else (2048 if bench.device.type == "cpu" else 8192)

    def make():
        layer = Linear(side, side).requires_grad_(False).to(bench.device, dtype)
        return layer, torch.randn(side, side, device=bench.device, dtype=dtype)

    pairs = bench.rotating(make, 4 * side**2)

    def multiply():
        layer, x = next(pairs)
        return layer(x)

    return 2 * side**3 / bench.turns({"matmul": multiply}, bench.seconds / 4)["matmul"].median


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def randomize(model: nn.Module) -> nn.Module:
    """Random matrices where a new model has zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that a benchmark may fill."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 2**30


# ----------------------------------------------------------------------------------------------------------------------
# Tables


@dataclass
class Table:
    """Cells are words, numbers, `Samples`, or None for what does not apply."""

    name: str
    title: str
    columns: list[str]
    rows: list[list] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for the {len(self.columns)} columns of table {self.name!r}.")
        self.rows.append(list(cells))

    def markdown(self) -> str:
        def text(cell) -> str:
            if cell is None:
                return ""
            return number(cell) if isinstance(cell, float) else str(cell)

        lines = [f"## {self.title}", ""] + [line for note in self.notes for line in (note, "")]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        return "\n".join(lines + ["| " + " | ".join(map(text, row)) + " |" for row in self.rows])

    def to_json(self) -> dict:
        def plain(cell):
            if not isinstance(cell, Samples):
                return cell
            low, high = cell.middle_half
            return {
                "unit": cell.unit, "median": cell.median, "middle_half": [low, high], "count": len(cell.values),
                "samples": cell.values,
            }  # fmt: skip

        return {
            "name": self.name,
            "title": self.title,
            "notes": self.notes,
            "columns": self.columns,
            "rows": [[plain(cell) for cell in row] for row in self.rows],
        }


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on."""
    facts = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30)
    return facts


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in ("diffusers", "triton", "natten"):
        if util.find_spec(name):
            found[name] = metadata.version(name)
    return found
