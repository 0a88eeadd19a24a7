"""Checkpoints: written whole or not at all, and verified before they are loaded.

    checkpoint-STEP/
      model.safetensors     the trained (not averaged) weights
      optimizer.pt          its state, by parameter name
      averages.pt           the moving averages
      progress.json         step, images seen, settings, learning-rate schedule
      checksums.json        SHA-256 of all the others

The files hold whole tensors by name, however the training was divided, so that a run can be resumed on another number of
processes, with or without sharding (FSDP2). Only DeepSpeed writes shards, into `deepspeed/`.
"""

import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..utils.distributed import broadcast_from_main
from ..utils.files import synchronize
from .config import RENAMED, names_where
from .ema import EMAWeights


CHECKSUMS = "checksums.json"
# Settings that a run in a folder of its own may change when it starts from another run's checkpoint.
FORKS_MAY_CHANGE = (
    *names_where(resume="fork"),
    "data",
    "order",
    "global_batch",
    "lr_schedule_steps",
    "mixed_precision",
)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; `verify` tells whether they are undamaged."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        # A name with more to it, such as checkpoint-500-backup, is somebody's own.
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and ((path / CHECKSUMS).exists() or (path / "progress.json").exists()):
            found[path] = int(match[1])
    return sorted(found, key=found.get)


def verify(path: Path) -> str | None:
    """Compare a checkpoint with its checksums; return None if it is as it was written, else what is wrong."""
    try:
        expected = json.loads((path / CHECKSUMS).read_text())
        if not expected or not all(isinstance(value, str) for value in expected.values()):
            return f"{CHECKSUMS} lists nothing"
        for name in expected:
            if not (path / name).is_file():
                return f"{name} is missing"
        for name, digest in zip(expected, hash_files([path / name for name in expected]), strict=True):
            if digest != expected[name]:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({type(error).__name__})"
    return None


def hash_files(paths: list[Path]) -> list[str]:
    def digest(path: Path) -> str:
        sha = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
        return sha.hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, paths))


def write_folder(path: Path, write: Callable[[Path], None], accelerator) -> None:
    """
    Make the folder `path` with what `write(folder)` puts into it, called on all processes.

    Whenever the machine stops, `path` is either not there (or what it was before), or complete and on the disk.

    Raises:
        OSError: on all processes, if the main one could not write.
    """
    partial = path.with_name(f".partial-{path.name}")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def end() -> None:
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        checksums = dict(zip([str(file.relative_to(partial)) for file in files], hash_files(files), strict=True))
        (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
        for written in (*partial.rglob("*"), partial):
            synchronize(written)
        # Only a damaged one can be there already: a run never reaches a step twice otherwise.
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        synchronize(path.parent)

    broadcast_from_main(begin)
    write(partial)
    accelerator.wait_for_everyone()
    broadcast_from_main(end)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a process left behind that was killed while it wrote or deleted checkpoints."""
    for pattern in (".partial-checkpoint-*", ".deleted-checkpoint-*"):
        for path in Path(output_dir).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def delete_old(output_dir: Path, step: int, total_limit: int | None) -> None:
    """Keep the checkpoint of `step`, just written, and the `total_limit` - 1 before it; later ones are not touched."""
    earlier = [path for path in checkpoints(output_dir) if step_of(path) < step]
    for path in earlier[: max(0, len(earlier) - total_limit + 1)] if total_limit else []:
        # Renamed first: half of a deleted checkpoint must not look like one.
        doomed = path.with_name(f".deleted-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def as_os_error(write: Callable[[], None]) -> None:
    """Call a function that writes files; PyTorch and safetensors have errors of their own where the disk is full."""
    try:
        write()
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error)) from error


def delete_before_full_disk(output_dir: Path, step: int, total_limit: int | None) -> None:
    """Delete what is over the limit before the next checkpoint is written, not after, if there is no room for one more."""
    earlier = checkpoints(output_dir)
    if earlier and shutil.disk_usage(output_dir).free < folder_size(earlier[-1]):
        delete_old(output_dir, step, max(2, total_limit) if total_limit else None)  # the newest one stays in any case


def folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def cannot_write(path: Path, error: OSError) -> str:
    """Say why a checkpoint was not written: a full disk reads otherwise in every library."""
    found, free = checkpoints(path.parent), shutil.disk_usage(path.parent).free
    needed = folder_size(found[-1]) if found else None
    full = error.errno == errno.ENOSPC or "No space left" in str(error) or (needed or 0) > free
    reason = "No space left on the device" if full else str(error).splitlines()[0]
    sizes = f" A checkpoint takes about {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free." if needed else ""
    kept = f" {found[-1].name} and the earlier checkpoints are unharmed." if found else ""
    return (
        f"{path} could not be written: {reason}.{sizes}{kept} Make room (--checkpoints_total_limit keeps fewer), or move the "
        "folder to a larger disk, and run the same command again."
    )


def find_checkpoint(output_dir: Path, resume_from: str | None, report: Callable[[str], None] = print) -> Path | None:
    """
    Return the checkpoint that a run starts from, None for the beginning.

    Args:
        output_dir: the run's folder. If it holds a run, that one resumes from its newest undamaged checkpoint.
        resume_from: None or "latest": as above. The name of a checkpoint in the folder: resume from that one. The path of
            another run's checkpoint: a new run in this folder starts from it, and later resumes from its own.
        report: called with a message for each damaged checkpoint that is skipped.

    Raises:
        ValueError: if the folder holds something else than a run, or the checkpoint is missing or damaged.
    """
    output_dir, found = Path(output_dir), checkpoints(output_dir)
    started = output_dir / "training_args.json"
    is_run = started.is_file() or bool(found)
    if not is_run and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(
            f"--output_dir {str(output_dir)!r} is not an empty folder, and does not hold a run to resume. Give "
            "another one. Nothing was changed."
        )
    named = None
    if resume_from not in (None, "latest"):
        named = Path(resume_from) if Path(resume_from).is_dir() else output_dir / resume_from
        check_named(named, resume_from, found)
    if named is not None and named.resolve().parent == output_dir.resolve():
        newer = [path for path in found if step_of(path) > step_of(named) and verify(path) is None]
        if newer:
            raise ValueError(
                f"{str(output_dir)!r} has a newer checkpoint, {newer[-1].name}, which resuming from {named.name} would "
                "mix with the new ones. Move it away, or start from the older one in another --output_dir. Nothing was changed."
            )
        return named

    for path in reversed(found):
        wrong = verify(path)
        if wrong is None:
            return path
        report(f"{path} is damaged ({wrong}) and not used.")
    if found or (named is None and (output_dir / "model_index.json").exists()):
        raise ValueError(
            f"{str(output_dir)!r} holds a run, but no checkpoint of it can be used. To start again from the beginning, "
            "give another --output_dir. Nothing was changed."
        )
    if named is None and (origin := started_from(started)):
        raise ValueError(
            f"the run in {str(output_dir)!r} started from {origin} and has no checkpoint of its own yet: start it with "
            "that --resume_from_checkpoint again. Nothing was changed."
        )
    return named


def check_named(path: Path, name: str, found: list[Path]) -> None:
    if not (path / CHECKSUMS).is_file():
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(
            f"there is no complete checkpoint {name!r}; in the --output_dir there are: {names}. Nothing was changed."
        )
    if wrong := verify(path):
        raise ValueError(f"the checkpoint {name!r} is damaged: {wrong}. Nothing was changed.")


def started_from(started: Path) -> str | None:
    """Return the other run's checkpoint that a run was told to start from, by its training_args.json."""
    try:
        origin = json.loads(started.read_text()).get("resume_from_checkpoint")
    except (OSError, ValueError, AttributeError):
        return None
    own = origin in (None, "latest") or (started.parent / origin).resolve().parent == started.parent.resolve()
    return None if own else origin


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def last_good(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that was not written in a row of skipped steps."""
    for path in reversed(checkpoints(output_dir)):
        if verify(path) is None and not json.loads((path / "progress.json").read_text())["watch"]["bad_in_row"]:
            return path
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Contents


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: dict,
    total_limit: int | None,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAWeights,
) -> Path:
    """
    Write `output_dir/checkpoint-STEP`, then delete the oldest ones over `total_limit`. All processes call it.

    Args:
        progress: JSON data with at least "step", "images_seen" and "settings".
        model, optimizer: as `accelerator.prepare` returned them.
    """
    path = Path(output_dir) / f"checkpoint-{progress['step']}"

    def write(folder: Path) -> None:
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            model.save_checkpoint(str(folder / "deepspeed"), tag="state")
        else:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(model, options=whole)
            state = get_optimizer_state_dict(model, unwrap_optimizer(optimizer), options=whole)
        averages = ema.state_dict()

        def write_files() -> None:
            if accelerator.distributed_type != DistributedType.DEEPSPEED:
                save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
                torch.save(state, folder / "optimizer.pt")
            torch.save(averages, folder / "averages.pt")
            extra = {} if accelerator.scaler is None else {"grad_scaler": accelerator.scaler.state_dict()}
            (folder / "progress.json").write_text(json.dumps({**progress, **extra}))

        broadcast_from_main(functools.partial(as_os_error, write_files))

    make_room = functools.partial(delete_before_full_disk, Path(output_dir), progress["step"], total_limit)
    broadcast_from_main(make_room)
    try:
        write_folder(path, write, accelerator)
    except OSError as error:
        if accelerator.is_main_process:
            remove_leftovers(Path(output_dir))
        raise OSError(cannot_write(path, error)) from error
    if accelerator.is_main_process:
        delete_old(Path(output_dir), progress["step"], total_limit)
    accelerator.wait_for_everyone()
    return path


def read_progress(path: Path, settings: dict, may_differ: Collection[str] = ()) -> dict:
    """
    Read a checkpoint's progress.json.

    Raises:
        ValueError: if it was written with other `settings` (the seed, the data, the model) than those in `may_differ`.
    """
    progress = json.loads((path / "progress.json").read_text())
    before = {RENAMED.get(key, key): value for key, value in progress["settings"].items()}
    changed = {
        key: f"{key} was {before.get(key)!r}, is {value!r}"
        for key, value in settings.items()
        if before.get(key) != value
    }
    if set(changed) - set(may_differ):
        forkable = not set(changed) - set(FORKS_MAY_CHANGE)
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(changed.values())}. "
            + (
                "To start from it with these, give another --output_dir and it in --resume_from_checkpoint. "
                * forkable
            )
            + "Nothing was changed."
        )
    return progress


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    settings: dict,
    may_differ: Collection[str] = (),
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAWeights,
) -> dict:
    """
    Load what `save_checkpoint` wrote, on all processes, and return its progress.

    Learning rates and other options of the optimizer's groups stay as they are.

    Raises:
        ValueError: if the checkpoint was written with other `settings` than those in `may_differ`, or with DeepSpeed and
            this run is without it, or vice versa.
    """
    progress = read_progress(path, settings, may_differ)
    by_deepspeed = (path / "deepspeed").is_dir()
    if by_deepspeed != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        with_, without = ("with", "without") if by_deepspeed else ("without", "with")
        raise ValueError(f"{path} was written {with_} DeepSpeed; a run {without} it can't be resumed from there.")
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if by_deepspeed:
        model.load_checkpoint(str(path / "deepspeed"), tag="state")
    else:
        several = accelerator.num_processes > 1
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
        read = accelerator.is_main_process or not several
        weights = load_file(path / "model.safetensors") if read else {}
        set_model_state_dict(model, weights, options=whole)
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True) if read else {}
        set_optimizer_state_dict(model, unwrap_optimizer(optimizer), state, options=whole)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    ema.load_state_dict(torch.load(path / "averages.pt", map_location="cpu", weights_only=True, mmap=True))
    if accelerator.scaler is not None and "grad_scaler" in progress:
        accelerator.scaler.load_state_dict(progress["grad_scaler"])
    return progress


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
