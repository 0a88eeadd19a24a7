"""Monitoring of a training: skipped steps, loss spikes, loss by noise level, `metrics.jsonl`.

Nothing here makes an accelerator wait: numbers are copied to the host as they arise and inspected one step later, when
the copy has arrived and the next step is running.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..utils.files import write_atomically


MAX_SKIPPED_STEPS = 10
# A spike is a loss this many standard deviations over the mean of the last SPIKE_MEMORY steps.
SPIKE_DEVIATIONS, SPIKE_MEMORY = 6.0, 100


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass
class StepRecord:
    """
    One optimizer step: `loss` and `grad_norm` are those of the global batch, the lists those of this process's images.

    The values are on the device until `copy_to_host` and `synchronize` were called.
    """

    step: int
    values: Tensor  # (2,): loss, gradient norm
    losses: Tensor  # (B,) of each image
    sigmas: Tensor  # (B,)
    indices: Tensor  # (B,) image numbers in the dataset
    event: "torch.Event | None" = None

    def copy_to_host(self) -> "StepRecord":
        """Start the copies to the host."""
        device = self.values.device
        if device.type != "cpu":
            for name in ("values", "losses", "sigmas"):
                tensor = getattr(self, name)
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
                setattr(self, name, pinned.copy_(tensor, non_blocking=True))
            self.event = torch.Event(device=device)
            self.event.record()
        return self

    def synchronize(self) -> "StepRecord":
        """Wait for the copies."""
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


# The names of the state in `progress.json`, which are those of the first version, and of the attributes.
MONITOR_STATE = {
    "bad": "skipped",
    "bad_in_row": "consecutive_skips",
    "losses": "losses",
    "grad_norms": "grad_norms",
    "lines": "messages",
    "recent": "recent_losses",
    "bad_ones": "recent_skips",
}


class TrainingMonitor:
    """
    Count skipped steps and report loss spikes, one step late, or at once after `flush`.

    Attributes:
        skipped: steps so far whose loss or gradient was not finite; they changed no weights.
        consecutive_skips: how many of them were the last steps.
        messages: what there is to tell since the last `pop`.
    """

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        self.pending: StepRecord | None = None
        self.recent_losses: deque[float] = deque(maxlen=SPIKE_MEMORY)
        self.skipped = self.consecutive_skips = 0
        self.recent_skips: deque[str] = deque(maxlen=MAX_SKIPPED_STEPS)
        self.messages: list[str] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def add(self, record: StepRecord) -> None:
        """
        Take a step's record, and inspect the one before.

        Raises:
            TrainingDiverged: after `MAX_SKIPPED_STEPS` skipped steps in a row.
        """
        pending, self.pending = self.pending, record.copy_to_host()
        if pending is not None:
            self.inspect(pending)

    def flush(self) -> None:
        """Inspect the newest step too, and wait for it."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.inspect(pending)

    def inspect(self, record: StepRecord) -> None:
        record.synchronize()
        if record.is_bad:
            self.skipped, self.consecutive_skips = self.skipped + 1, self.consecutive_skips + 1
            message = (
                f"step {record.step}: loss {record.loss:.4g}, gradient norm {record.grad_norm:.4g}; "
                + self.worst(record)
            )
            self.recent_skips.append(message)
            self.messages.append(f"Skipped {message}")
            if self.consecutive_skips >= MAX_SKIPPED_STEPS:
                raise TrainingDiverged(
                    f"{self.consecutive_skips} steps in a row had a loss or gradient that is not finite:\n  "
                    + "\n  ".join(self.recent_skips)
                )
            return
        self.consecutive_skips = 0
        self.losses.append(record.loss)
        self.grad_norms.append(record.grad_norm)
        if len(self.recent_losses) == SPIKE_MEMORY:
            recent = torch.tensor(self.recent_losses, dtype=torch.float64)
            deviations = (record.loss - recent.mean().item()) / max(recent.std().item(), 1e-12)
            if deviations > SPIKE_DEVIATIONS:
                self.messages.append(
                    f"Loss spike at step {record.step}: {record.loss:.4g}, {deviations:.0f} standard deviations over the "
                    f"mean of {SPIKE_MEMORY} steps ({recent.mean().item():.4g}); {self.worst(record)}"
                )
        self.recent_losses.append(record.loss)

    def worst(self, record: StepRecord) -> str:
        """Name the images of the global batch with the highest loss; all processes see the same loss, so all call it."""
        order = record.losses.float().nan_to_num(nan=math.inf).argsort(descending=True)[:3].tolist()
        here = [(record.losses[i].item(), record.sigmas[i].item(), int(record.indices[i])) for i in order]
        everywhere = gather_object(here) if self.num_processes > 1 else here
        everywhere.sort(key=lambda image: image[0] if math.isfinite(image[0]) else math.inf, reverse=True)
        return "worst images: " + ", ".join(f"{i} (sigma {s:.3g}, loss {loss:.3g})" for loss, s, i in everywhere[:3])

    def pop(self) -> tuple[list[float], list[float], list[str]]:
        """Return the losses and gradient norms of the steps taken since the last call, and the messages."""
        popped = self.losses, self.grad_norms, self.messages
        self.losses, self.grad_norms, self.messages = [], [], []
        return popped

    def state_dict(self) -> dict:
        """Return JSON data; after `flush`."""
        state = {name: getattr(self, attribute) for name, attribute in MONITOR_STATE.items()}
        return {name: list(value) if isinstance(value, deque) else value for name, value in state.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, attribute in MONITOR_STATE.items():
            before = getattr(self, attribute)
            value = deque(state[name], maxlen=before.maxlen) if isinstance(before, deque) else state[name]
            setattr(self, attribute, value)


class Stopwatch:
    """Measures the seconds of training since the last report, without pauses for saving and sampling."""

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
        """Return the next batch, and count the time it takes as waiting for data."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - begin
        return batch

    @property
    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.began - self.paused)


class LossBySigma:
    """Sums up losses in bins of ln(sigma), four per decade from 1e-3 to 1e3, on the device."""

    def __init__(self, device: torch.device):
        self.edges = torch.logspace(-3, 3, 25, dtype=torch.float64).float().to(device)
        self.sums = torch.zeros(2, 26, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)

    def add(self, sigmas: Tensor, losses: Tensor) -> None:
        """Add losses `(B,)` at their noise levels `(B,)`, both on the device."""
        finite = losses.isfinite()
        values = torch.stack((torch.where(finite, losses, 0.0), finite)).to(self.sums.dtype)
        self.sums.index_add_(1, torch.bucketize(sigmas, self.edges), values)

    def state(self, reduce: Callable) -> list:
        """Return the sums of all processes as JSON data."""
        return reduce(self.sums).tolist()

    def load_state(self, state: list) -> None:
        """Load the sums of all processes, on one process only."""
        self.sums.copy_(torch.tensor(state, dtype=self.sums.dtype))

    def pop(self, reduce: Callable) -> dict:
        """Return `{"sigma": bin middles, "loss": means, "images": counts}` of the bins that have any, and reset them."""
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
    """`metrics.jsonl`, a JSON object per line; a resumed run continues after its checkpoint's step."""

    def __init__(self, path: Path, step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] <= step] if step else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept), durable=True)

    def last_step_with(self, name: str) -> int | None:
        """Return the newest step that recorded a value of this name."""
        return max((line["step"] for line in read_lines(self.path) if name in line), default=None)

    def add(self, **values) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:  # writing into an open file, Python names none
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_lines(path: Path) -> list[dict]:
    """Read the lines of a `metrics.jsonl`; one that was cut off by a crash is left out."""
    lines = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]
