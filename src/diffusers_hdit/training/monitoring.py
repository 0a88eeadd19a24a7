"""What is seen of a training while it runs: bad steps, loss spikes, loss by noise level, `metrics.jsonl`.

Nothing here makes an accelerator wait: numbers are copied off it as they arise and looked at one step later, when the
copy has long arrived and the next step is under way.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .checkpointing import write_durably


MAX_BAD_STEPS = 10
# A spike is a loss this many standard deviations over the mean of the last SPIKE_MEMORY steps.
SPIKE_DEVIATIONS, SPIKE_MEMORY = 6.0, 100


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is no number."""


@dataclass
class StepRecord:
    """
    One optimizer step. On the device until `arrive`d; `loss` and `grad_norm` are those of the global batch, the lists
    those of this process's images.
    """

    step: int
    values: Tensor  # (2,): loss, gradient norm
    losses: Tensor  # (B,) of each image
    sigmas: Tensor  # (B,)
    indices: Tensor  # (B,) image numbers in the dataset
    event: "torch.Event | None" = None

    def leave(self) -> "StepRecord":
        """Starts the copies to the host."""
        device = self.values.device
        if device.type != "cpu":
            for name in ("values", "losses", "sigmas"):
                tensor = getattr(self, name)
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
                setattr(self, name, pinned.copy_(tensor, non_blocking=True))
            self.event = torch.Event(device=device)
            self.event.record()
        return self

    def arrive(self) -> "StepRecord":
        if self.event is not None:
            self.event.synchronize()
        return self

    @property
    def loss(self) -> float:
        return self.values[0].item()

    @property
    def grad_norm(self) -> float:
        return self.values[1].item()

    @property
    def is_bad(self) -> bool:
        return not bool(self.values.isfinite().all())


class Watch:
    """
    Counts bad steps and names loss spikes; one step late, or at once after `catch_up`.

    Attributes:
        bad: steps so far whose loss or gradient was not finite; they changed no weights.
        bad_in_row: how many of them were the last ones.
        lines: what there is to say since they were last taken.
    """

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        self.waiting: StepRecord | None = None
        self.recent: deque[float] = deque(maxlen=SPIKE_MEMORY)
        self.bad = self.bad_in_row = 0
        self.bad_ones: deque[str] = deque(maxlen=MAX_BAD_STEPS)
        self.lines: list[str] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def add(self, record: StepRecord) -> None:
        """
        Takes a step's record and looks at the one before.

        Raises:
            TrainingDiverged: after `MAX_BAD_STEPS` bad steps in a row.
        """
        waiting, self.waiting = self.waiting, record.leave()
        if waiting is not None:
            self.look_at(waiting)

    def catch_up(self) -> None:
        """Looks at the newest step too, waiting for it."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self.look_at(waiting)

    def look_at(self, record: StepRecord) -> None:
        record.arrive()
        if record.is_bad:
            self.bad, self.bad_in_row = self.bad + 1, self.bad_in_row + 1
            line = f"step {record.step}: loss {record.loss:.4g}, gradient norm {record.grad_norm:.4g}; " + self.worst(
                record
            )
            self.bad_ones.append(line)
            self.lines.append(f"Skipped {line}")
            if self.bad_in_row >= MAX_BAD_STEPS:
                raise TrainingDiverged(
                    f"{self.bad_in_row} steps in a row had a loss or gradient that is not finite:\n  "
                    + "\n  ".join(self.bad_ones)
                )
            return
        self.bad_in_row = 0
        self.losses.append(record.loss)
        self.grad_norms.append(record.grad_norm)
        if len(self.recent) == SPIKE_MEMORY:
            recent = torch.tensor(self.recent, dtype=torch.float64)
            deviations = (record.loss - recent.mean().item()) / max(recent.std().item(), 1e-12)
            if deviations > SPIKE_DEVIATIONS:
                self.lines.append(
                    f"Loss spike at step {record.step}: {record.loss:.4g}, {deviations:.0f} standard deviations over the "
                    f"mean of {SPIKE_MEMORY} steps ({recent.mean().item():.4g}); {self.worst(record)}"
                )
        self.recent.append(record.loss)

    def worst(self, record: StepRecord) -> str:
        """The images of the global batch with the highest loss. All processes see the same loss, so all come here."""
        order = record.losses.float().nan_to_num(nan=math.inf).argsort(descending=True)[:3].tolist()
        here = [(record.losses[i].item(), record.sigmas[i].item(), int(record.indices[i])) for i in order]
        everywhere = gather_object(here) if self.num_processes > 1 else here
        everywhere.sort(key=lambda image: image[0] if math.isfinite(image[0]) else math.inf, reverse=True)
        return "worst images: " + ", ".join(f"{i} (sigma {s:.3g}, loss {loss:.3g})" for loss, s, i in everywhere[:3])

    def take(self) -> tuple[list[float], list[float], list[str]]:
        """Losses and gradient norms of the good steps since the last call, and lines to print."""
        taken = self.losses, self.grad_norms, self.lines
        self.losses, self.grad_norms, self.lines = [], [], []
        return taken

    def state_dict(self) -> dict:
        """JSON data; after `catch_up`."""
        names = ("bad", "bad_in_row", "losses", "grad_norms", "lines")
        lists = {"recent": list(self.recent), "bad_ones": list(self.bad_ones)}
        return {name: getattr(self, name) for name in names} | lists

    def load_state_dict(self, state: dict) -> None:
        for name in ("bad", "bad_in_row", "losses", "grad_norms", "lines"):
            setattr(self, name, state[name])
        self.recent = deque(state["recent"], maxlen=SPIKE_MEMORY)
        self.bad_ones = deque(state["bad_ones"], maxlen=MAX_BAD_STEPS)


class Stopwatch:
    """Seconds of training since the last report, without pauses for saving and drawing, and what they were spent on."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.began, self.paused, self.waited, self.steps = time.perf_counter(), 0.0, 0.0, 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begin

    def wait_for(self, batches: Iterator):
        """The next batch; the time it takes counts as waiting for data."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - begin
        return batch

    @property
    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.began - self.paused)


class LossBySigma:
    """Sums of losses in bins of ln(sigma), four a decade from 1e-3 to 1e3, kept on the device."""

    def __init__(self, device: torch.device):
        self.edges = torch.logspace(-3, 3, 25, dtype=torch.float64).float().to(device)
        self.sums = torch.zeros(2, 26, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)

    def add(self, sigmas: Tensor, losses: Tensor) -> None:
        """`(B,)` each, on the device."""
        finite = losses.isfinite()
        values = torch.stack((torch.where(finite, losses, 0.0), finite)).to(self.sums.dtype)
        self.sums.index_add_(1, torch.bucketize(sigmas, self.edges), values)

    def state(self, reduce) -> list:
        """JSON data: the sums of all processes."""
        return reduce(self.sums).tolist()

    def load_state(self, state: list) -> None:
        """On one process only: the sums are those of all."""
        self.sums.copy_(torch.tensor(state, dtype=self.sums.dtype))

    def take(self, reduce) -> dict:
        """`{"sigma": bin middles, "loss": means, "images": counts}` of the bins that got any; starts anew."""
        sums, counts = reduce(self.sums).tolist()
        self.sums.zero_()
        edges = self.edges.tolist()
        step = edges[1] / edges[0]
        middles = [edges[0] / step**0.5, *(edge * step**0.5 for edge in edges)]
        filled = [i for i, count in enumerate(counts) if count]
        return {
            "sigma": [float(f"{middles[i]:.4g}") for i in filled],
            "loss": [sums[i] / counts[i] for i in filled],
            "images": [int(counts[i]) for i in filled],
        }


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, by step. A resumed run goes on after its checkpoint's step."""

    def __init__(self, path: Path, step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] <= step] if step else []
        write_durably(path, "".join(json.dumps(line) + "\n" for line in kept))

    def last_step_with(self, name: str) -> int | None:
        """The newest step that wrote down a value of this name."""
        return max((line["step"] for line in read_lines(self.path) if name in line), default=None)

    def add(self, **values) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; one that was cut off by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]
