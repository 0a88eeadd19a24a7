"""Moving averages (EMA) of the weights, which everything that is sampled, saved as a pipeline or pushed is made with.

There are two kinds, and a run can keep any number of each (`EMAWeights`):

* warm-up EMA, as in the reference implementation (k-diffusion): the decay grows with the steps up to a ceiling;
* power-function EMA (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv
  2312.02696, section 3): it covers a fixed share of the run so far, and from snapshots of two of them an average of any
  other width can be reconstructed afterwards (`save_snapshot`, `reconstruct`).

That share is given as the relative standard deviation sigma_rel: the standard deviation of the averaging profile divided
by the number of steps; 0.05 and 0.10 in the paper.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..utils.distributed import is_distributed
from ..utils.files import atomic_path


METADATA_KEY = "average"
MAX_SIGMA_REL = 12**-0.5  # sigma_rel of a uniform average, gamma = 0


# ----------------------------------------------------------------------------------------------------------------------
# Profiles


def warm_up_decay(n: int, decay: float) -> float:
    """Return the decay of update n = 0, 1, ...: min(decay, 1 - (1 + n)^-0.75), so that a short run forgets its start."""
    return min(decay, 1 - (1 + n) ** -0.75)


def power_decay(step: int, gamma: float) -> float:
    """
    Return the decay of update `step` = 1, 2, ... of a power-function EMA: (1 - 1/step)^(gamma + 1), equation 127 of Karras
    et al. (2024). With it the average after t steps weighs the parameters of step i by exactly
    (i/t)^(gamma + 1) - ((i - 1)/t)^(gamma + 1).
    """
    return (1 - 1 / step) ** (gamma + 1)


def sigma_rel_of_gamma(gamma: float) -> float:
    """Return the sigma_rel of the profile tau^gamma, equation 123 of Karras et al. (2024)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of_sigma_rel(sigma_rel: float) -> float:
    """
    Return the exponent gamma > 0 of the profile of relative standard deviation `sigma_rel`: the largest root of
    (gamma + 2)^2 (gamma + 3) = (gamma + 1) sigma_rel^-2, equation 126 and algorithm 2 of Karras et al. (2024).

    Raises:
        ValueError: unless 0 < sigma_rel < 12^-0.5 = 0.2887, as profiles that grow towards the end have.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(
            f"the sigma_rel of a power-function average must be between 0 and {MAX_SIGMA_REL:.4f} (a uniform average), both "
            f"excluded, got {sigma_rel}. The paper uses 0.05 and 0.10."
        )
    inverse = float(sigma_rel) ** -2
    gamma = float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())
    for _ in range(2):  # Newton on the logarithms, to the last digits that the companion matrix leaves
        excess = 2 * math.log(gamma + 2) + math.log(gamma + 3) - math.log(gamma + 1) - math.log(inverse)
        gamma -= excess / (2 / (gamma + 2) + 1 / (gamma + 3) - 1 / (gamma + 1))
    return gamma


# ----------------------------------------------------------------------------------------------------------------------
# The averages of a run


class EMAWeights:
    """
    All moving averages of one run, updated together after each optimizer step.

    Diffusers' `EMAModel` holds one average, in the parameters' own precision, without names, and as shards that only
    the same number of processes can load again. Here the averages are float32 whatever the model runs in, are sharded
    like the parameters (DTensors of FSDP2 included), and are saved whole, so that a checkpoint can be loaded with any
    number of processes, sharded or not. The warm-up EMA is that of
    `EMAModel(use_ema_warmup=True, inv_gamma=1, power=0.75)`.

    Args:
        model: the network itself, on its device, after `accelerator.prepare`.
        decays: ceilings of warm-up EMAs, 0 <= decay < 1.
        sigma_rels: relative standard deviations of power-function EMAs, between 0 and 0.2887.
        float32_value: returns the current float32 value of a parameter, in its shape and on its device, where the
            parameter itself is only a rounded copy: `deepspeed.utils.safe_get_full_fp32_param` under ZeRO with bf16.

    Attributes:
        names: `["0.9999", ..., "power-0.05", ...]`; the first is the main one, which is sampled and saved.
        count: updates so far.

    Raises:
        ValueError: for decays or sigma_rels out of range, given twice, or none at all.
    """

    def __init__(
        self,
        model: nn.Module,
        decays: Sequence[float] = (0.9999,),
        sigma_rels: Sequence[float] = (),
        float32_value: Callable[[nn.Parameter], Tensor] | None = None,
    ):
        wrong = [decay for decay in decays if not 0 <= decay < 1]
        if wrong:
            raise ValueError(f"the decay of an average must be at least 0 and below 1, got {wrong[0]}.")
        self._decays = {str(float(decay)): float(decay) for decay in decays}
        self._gammas = {power_name(sigma_rel): gamma_of_sigma_rel(sigma_rel) for sigma_rel in sigma_rels}
        self.names = [*self._decays, *self._gammas]
        if len(self.names) != len(decays) + len(sigma_rels):
            raise ValueError(f"an average is given twice: decays {list(decays)}, sigma_rels {list(sigma_rels)}.")
        if not self.names:
            raise ValueError("no average is given: give at least one decay or one sigma_rel.")
        self.sigma_rels = {power_name(sigma_rel): float(sigma_rel) for sigma_rel in sigma_rels}
        self.count = 0
        self._model = model
        self._float32_value = float32_value
        self._swapped = False
        start = self._values(self._parameters())
        self._averages = {name: [value.clone() for value in start] for name in self.names}

    def step(self) -> None:
        """Update all averages, after a step of the optimizer."""
        if self._swapped:
            raise RuntimeError(
                "the model has averaged weights now, which must not be averaged again: leave the `swapped` block first."
            )
        self.count += 1
        weights = [1 - warm_up_decay(self.count - 1, decay) for decay in self._decays.values()]
        weights += [1 - power_decay(self.count, gamma) for gamma in self._gammas.values()]
        parameters = self._parameters()
        values = [local(parameter) for parameter in parameters.values()]
        with torch.no_grad():
            if self._float32_value is None and all(value.dtype == torch.float32 for value in values):
                for name, weight in zip(self.names, weights, strict=True):
                    torch._foreach_lerp_(self._averages[name], values, weight)
                return
            # One parameter at a time: a float32 copy of all would double what the averages take.
            for i, parameter in enumerate(parameters.values()):
                value = self._value(parameter)
                for name, weight in zip(self.names, weights, strict=True):
                    self._averages[name][i].lerp_(value, weight)

    @contextmanager
    def swapped(self, name: str | None = None) -> Iterator[nn.Module]:
        """
        Give the model the averaged weights `name` (default: the main ones) inside the block.

        At its end, errors included, the trained weights are restored bit for bit. They are kept in main memory, as in
        Diffusers' `EMAModel`.
        """
        averages = self._averages[self._known(name)]
        if self._swapped:
            raise RuntimeError("the model has averaged weights already.")
        parameters = [local(parameter) for parameter in self._parameters().values()]
        trained = [parameter.to("cpu", copy=True) for parameter in parameters]
        self._swapped = True
        try:
            with torch.no_grad():
                torch._foreach_copy_(parameters, averages)
            yield self._model
        finally:
            # What a forward pass has gathered of the averages must not serve the next training step.
            parameters = [local(parameter) for parameter in self._parameters().values()]
            with torch.no_grad():
                torch._foreach_copy_(parameters, trained)
            self._swapped = False

    def full_state_dict(self, name: str | None = None) -> dict[str, Tensor] | None:
        """
        Return the averaged weights `name` (default: the main ones) and the model's persistent buffers by their names in
        `model.state_dict()`: whole tensors in main memory, floating-point ones in float32. Every process calls it; the
        main process gets the dict, the others None.
        """
        averages = self._averages[self._known(name)]
        full = self._full(averages)
        if not is_main_process():
            return None
        buffers = self.buffer_names()
        for key, value in self._model.state_dict().items():
            if key in buffers:
                full[key] = (value.float() if value.is_floating_point() else value).to("cpu", copy=True)
        return full

    def buffer_names(self) -> list[str]:
        """Return the names in the model's state dict that are not parameters."""
        parameters = self._parameters()
        return [key for key in self._model.state_dict() if key not in parameters]

    def state_dict(self) -> dict:
        """Return the state for a checkpoint; every process calls it, and the main one's has the (whole) averages."""
        full = {name: self._full(averages) for name, averages in self._averages.items()}
        return {"count": self.count, "averages": full if is_main_process() else {}}

    def load_state_dict(self, state: dict) -> None:
        """
        Load what the main process's `state_dict` returned, on every process, which keeps its shards.

        Raises:
            ValueError: if it has other averages, or those of another network.
        """
        saved = state.get("averages", {})
        if set(saved) != set(self.names):
            raise ValueError(
                f"the checkpoint has the averages {', '.join(saved) or 'of nothing'}; this run has "
                f"{', '.join(self.names)}. Resume with the same ones."
            )
        parameters = self._parameters()
        for name in self.names:
            shapes = {key: tuple(value.shape) for key, value in saved[name].items()}
            if shapes != {key: tuple(parameter.shape) for key, parameter in parameters.items()}:
                raise ValueError(
                    f"the average {name} of the checkpoint is of another network than the one trained now."
                )
        for name in self.names:
            for average, (key, parameter) in zip(self._averages[name], parameters.items(), strict=True):
                average.copy_(shard_like(saved[name][key], parameter))
        self.count = int(state["count"])

    def _known(self, name: str | None) -> str:
        if name is not None and name not in self.names:
            raise ValueError(f"there is no average {name!r}; there are {', '.join(self.names)}.")
        return self.names[0] if name is None else name

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, looked up each time: FSDP2 exchanges the sharded and the gathered ones."""
        if is_distributed():
            from torch.distributed.fsdp import FSDPModule

            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return dict(self._model.named_parameters())

    def _value(self, parameter: nn.Parameter) -> Tensor:
        value = parameter if self._float32_value is None else self._float32_value(parameter)
        return local(value).float()

    def _values(self, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
        return [self._value(parameter) for parameter in parameters.values()]

    def _full(self, averages: list[Tensor]) -> dict[str, Tensor]:
        """Gather averages parameter by parameter; the result is empty on all but the main process."""
        keep, full = is_main_process(), {}
        for (key, parameter), average in zip(self._parameters().items(), averages, strict=True):
            whole = gather_like(average, parameter)
            if keep:
                full[key] = whole.to("cpu", copy=True)
        return full


def power_name(sigma_rel: float) -> str:
    return f"power-{float(sigma_rel)}"


def is_main_process() -> bool:
    return not is_distributed() or torch.distributed.get_rank() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, or any other tensor itself; it shares the memory and needs no gradient."""
    if is_sharded(tensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.detach()


def gather_like(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole tensor of `shard`, sharded as `parameter` is; a collective where that is a DTensor."""
    if not is_sharded(parameter):
        return shard
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return whole.full_tensor()


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, sharded as `parameter` is; a collective where that is a DTensor."""
    whole = whole.to(parameter.device)
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()


# ----------------------------------------------------------------------------------------------------------------------
# Snapshots


def save_snapshot(averages: EMAWeights, folder: Path, step: int, dtype: torch.dtype = torch.float16) -> list[Path]:
    """
    Write each power-function EMA to `folder/step-STEP-power-SIGMA_REL.safetensors`, from which `reconstruct` makes others.

    Every process calls it. A file gets its name when it is complete; a snapshot of the same step is replaced, by the same
    bytes if the run was resumed from an earlier checkpoint.

    Args:
        averages: with at least one sigma_rel.
        step: steps of the optimizer so far; it must be the averages' own count.
        dtype: of the stored parameters. Half precision, as in the paper, rounds each by at most 2^-11 of itself. A
            reconstruction between the stored sigma_rels has about as much of that error, one of 0.4 times the smallest
            ten to twenty times as much. Buffers stay float32.

    Returns:
        The paths, on every process.

    Raises:
        ValueError: without power-function EMAs, for another step than the averages', for parameters beyond the dtype.
    """
    if not averages.sigma_rels:
        raise ValueError("a snapshot stores power-function averages, and this run has none: give it sigma_rels.")
    if step != averages.count or step < 1:
        raise ValueError(f"the averages are those of step {averages.count}, not of step {step}.")
    folder = Path(folder)
    paths = []
    for name, sigma_rel in averages.sigma_rels.items():
        path = folder / f"step-{step:08d}-{name}.safetensors"
        tensors = averages.full_state_dict(name)
        if tensors is not None:
            buffers = averages.buffer_names()
            stored = {key: value if key in buffers else value.to(dtype) for key, value in tensors.items()}
            lost = [key for key in stored if key not in buffers and not stored[key].isfinite().all()]
            if lost:
                raise ValueError(
                    f"{lost[0]} at step {step} has values that {dtype} can't hold; no snapshot was written."
                )
            write_snapshot(path, stored, {"step": step, "sigma_rel": sigma_rel, "buffers": buffers})
        paths.append(path)
    return paths


def write_snapshot(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write safetensors with the metadata as JSON under one key: the order of several in the file would be random."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    with atomic_path(path, durable=True) as partial:
        save_file(contiguous, partial, {METADATA_KEY: json.dumps(metadata)})


def find_snapshots(folder: Path) -> list[Path]:
    """Return the snapshots in a folder, by step and sigma_rel."""
    name = re.compile(r"step-\d+-power-[\d.e-]+\.safetensors")
    return sorted(path for path in Path(folder).glob("step-*.safetensors") if name.fullmatch(path.name))


def read_snapshot_metadata(path: Path) -> tuple[int, float, list[str]]:
    """
    Return (step, sigma_rel, names of buffers) of a snapshot.

    Raises:
        ValueError: for a file that is no snapshot.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
        return int(metadata["step"]), float(metadata["sigma_rel"]), list(metadata["buffers"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a snapshot of an average: {error}.") from error


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction


def profile_products(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """
    Return the integral over time of the product of two profiles (gamma + 1) tau^gamma / t^(gamma + 1), 0 < tau < t, broadcast and
    in float64; equation 151 of Karras et al. (2024). It is arranged so that no power exceeds 1.
    """
    earlier_is_a = step_a < step_b
    ratio = np.minimum(step_a, step_b) / np.maximum(step_a, step_b)
    exponent = np.where(earlier_is_a, gamma_b, gamma_a)
    products = (gamma_a + 1) * (gamma_b + 1) * ratio**exponent
    return products / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))


def reconstruction_coefficients(profiles: Sequence[tuple[int, float]], sigma_rel: float, step: int) -> np.ndarray:
    """
    Return float64 coefficients, with sum 1, of the combination of averages with `profiles` (step, sigma_rel) whose profile
    is closest, in least squares, to that of `sigma_rel` at `step`: section 3.2 and algorithm 3 of Karras et al. (2024).

    Raises:
        ValueError: for profiles that are given twice, lie after `step`, or can't be told apart in float64.
    """
    gamma = gamma_of_sigma_rel(sigma_rel)
    profiles = [(int(t), float(stored)) for t, stored in profiles]
    if not profiles or len(set(profiles)) < len(profiles) or any(not 0 < t <= step for t, _ in profiles):
        raise ValueError(f"need different profiles of steps from 1 to {step}, got {profiles}.")
    if (step, float(sigma_rel)) in profiles:  # the system would say so too, to rounding
        return np.array([float(profile == (step, float(sigma_rel))) for profile in profiles])
    steps = np.array([t for t, _ in profiles], dtype=np.float64)
    gammas = np.array([gamma_of_sigma_rel(stored) for _, stored in profiles])
    matrix = profile_products(steps[:, None], gammas[:, None], steps[None], gammas[None])
    target = profile_products(steps, gammas, np.float64(step), np.float64(gamma))
    # Rows and columns scaled to a unit diagonal: early snapshots have large products.
    scale = 1 / np.sqrt(np.diag(matrix))
    try:
        coefficients = scale * np.linalg.solve(scale[:, None] * matrix * scale, scale * target)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"the profiles {profiles} are too alike to tell apart: leave some out.") from error
    return coefficients / coefficients.sum()


def profile_mismatch(profiles: Sequence[tuple[int, float]], sigma_rel: float, step: int) -> float:
    """
    Return the relative error, in the 2-norm over time, of the profile of `reconstruction_coefficients`.

    The error of a reconstruction is about as large, relative to what averaging changes of the weights.
    """
    coefficients = reconstruction_coefficients(profiles, sigma_rel, step)
    steps = np.array([*(t for t, _ in profiles), step], dtype=np.float64)
    gammas = np.array([gamma_of_sigma_rel(value) for value in (*(stored for _, stored in profiles), sigma_rel)])
    products = profile_products(steps[:, None], gammas[:, None], steps[None], gammas[None])
    difference = np.append(coefficients, -1.0)
    return math.sqrt(max(0.0, difference @ products @ difference) / products[-1, -1])


def reconstruct(snapshots: Sequence[Path], sigma_rel: float, at_step: int | None = None) -> dict[str, Tensor]:
    """
    Return the state dict (float32, in main memory) of a power-function EMA of `sigma_rel` at a step, from snapshots of
    others. It is close to the average that the run itself would have kept; at a stored sigma_rel and step it is that
    snapshot. Profiles far outside the stored ones can't be reconstructed well.

    Args:
        snapshots: files of `save_snapshot`; those after `at_step` are not used.
        sigma_rel: between 0 and 0.2887.
        at_step: the step of one of the snapshots; default: the latest.

    Raises:
        ValueError: for no snapshots, a step without one, a sigma_rel out of range, snapshots of different networks.
    """
    from safetensors import safe_open

    gamma_of_sigma_rel(sigma_rel)
    described = {Path(path): read_snapshot_metadata(path) for path in snapshots}
    profiles = {path: (step, stored) for path, (step, stored, _) in described.items()}
    if not profiles:
        raise ValueError("there are no snapshots to reconstruct an average from.")
    steps = sorted({step for step, _ in profiles.values()})
    at_step = steps[-1] if at_step is None else at_step
    if at_step not in steps:
        raise ValueError(f"there is no snapshot of step {at_step}; there are those of {', '.join(map(str, steps))}.")
    profiles = {path: profile for path, profile in profiles.items() if profile[0] <= at_step}
    coefficients = reconstruction_coefficients(list(profiles.values()), sigma_rel, at_step)
    used = [(path, c) for path, c in zip(profiles, coefficients, strict=True) if c != 0]
    last = max(profiles, key=lambda path: profiles[path][0])
    files = {path: safe_open(path, framework="pt") for path in {last, *(path for path, _ in used)}}
    for path, file in files.items():
        if sorted(file.keys()) != sorted(files[last].keys()):
            raise ValueError(f"{str(path)!r} and {str(last)!r} are of different networks.")
    buffers = described[last][2]
    state = {}
    for key in sorted(files[last].keys()):
        newest = files[last].get_tensor(key)
        if key in buffers:
            state[key] = newest
            continue
        total = torch.zeros(newest.shape, dtype=torch.float64)
        for path, coefficient in used:
            value = files[path].get_tensor(key)
            if value.shape != newest.shape:
                raise ValueError(f"{str(path)!r} and {str(last)!r} are of different networks: {key} differs in shape.")
            total.add_(value, alpha=coefficient)
        state[key] = total.float()
    return state
