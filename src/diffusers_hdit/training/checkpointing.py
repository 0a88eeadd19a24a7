"""Checkpoints to trust for weeks: written whole or not at all, and checked before they are used.

    checkpoint-STEP/
      model.safetensors     the trained (not averaged) weights
      optimizer.pt          its state, by parameter name
      averages.pt           the moving averages
      progress.json         step, images seen, settings, learning-rate schedule
      checksums.json        SHA-256 of all the others

The files are whole tensors by name, however the training was divided, so that a run can go on with another number of
processes, with or without sharding (FSDP2). Only DeepSpeed divides them itself, into `deepspeed/`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


CHECKSUMS = "checksums.json"
# Settings that may be others in a run that goes on, in a folder of its own, from another run's checkpoint.
FORKS_MAY_CHANGE = ("learning_rate", "mapping_lr_scale", "lr_scheduler", "adam_beta1", "adam_beta2", "adam_epsilon",
                    "adam_weight_decay", "seed", "random_flip", "center_crop", "augment_prob", "label_dropout",
                    "noise_density", "noise_density_params", "loss_weighting", "data", "order", "buckets",
                    "streaming", "global_batch", "max_grad_norm", "lr_warmup_steps", "lr_schedule_steps",
                    "mixed_precision")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; whether they are undamaged is for `damage` to say."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        # A name with more to it, such as checkpoint-500-backup, is somebody's own.
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and ((path / CHECKSUMS).exists() or (path / "progress.json").exists()):
            found[path] = int(match[1])
    return sorted(found, key=found.get)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, or is not what was written; None if nothing is."""
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
    Makes the folder `path` with what `write(folder)` puts into it, on all processes. Whenever the machine stops, `path`
    is either not there (or what it was before), or whole and on the disk.

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
            sync(written)
        # Only a damaged one can be there already: a run never reaches a step twice otherwise.
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        sync(path.parent)

    on_main(accelerator, begin)
    write(partial)
    accelerator.wait_for_everyone()
    on_main(accelerator, end)


def on_main(accelerator, function: Callable[[], object], errors=(OSError,)):
    """Calls it on the main process; what it returns, or raises of `errors`, comes on all of them."""
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except errors as error:
            if accelerator.num_processes == 1:
                raise
            answer[1] = error
    answer, error = broadcast_object_list(answer)
    if error is not None:
        raise error
    return answer


def write_durably(path: Path, text: str) -> None:
    """A file that is what it was before, or has the new text, whenever the machine stops."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def remove_leftovers(output_dir: Path) -> None:
    """What a process that was killed while it wrote or deleted checkpoints left behind."""
    for pattern in (".partial-checkpoint-*", ".deleted-checkpoint-*"):
        for path in Path(output_dir).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders, and writes their names through
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete_old(output_dir: Path, step: int, total_limit: int | None) -> None:
    """Keeps the checkpoint of `step`, just written, and the `total_limit` - 1 before it; later ones are left alone."""
    earlier = [path for path in checkpoints(output_dir) if step_of(path) < step]
    for path in earlier[: max(0, len(earlier) - total_limit + 1)] if total_limit else []:
        # Renamed first: half of a deleted checkpoint must not look like one.
        doomed = path.with_name(f".deleted-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def find_checkpoint(output_dir: Path, resume_from: str | None, report: Callable[[str], None] = print) -> Path | None:
    """
    Where a run starts: None for the beginning.

    Args:
        output_dir: the run's folder. If it holds a run, that one goes on from its newest undamaged checkpoint.
        resume_from: None or "latest": as above. The name of a checkpoint in the folder: as above, but from this one. The
            path of another run's: where a run in this folder begins, which later goes on from its own.
        report: told of each damaged checkpoint that is passed over.

    Raises:
        ValueError: if the folder holds something else than a run, or the checkpoint is not there, or is damaged.
    """
    output_dir, found = Path(output_dir), checkpoints(output_dir)
    started = output_dir / "training_args.json"
    is_run = started.is_file() or bool(found)
    if not is_run and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(
            f"--output_dir {str(output_dir)!r} is not an empty folder, and does not hold a run to go on with. Give "
            "another one. Nothing was changed."
        )
    named = None
    if resume_from not in (None, "latest"):
        named = Path(resume_from) if Path(resume_from).is_dir() else output_dir / resume_from
        check_named(named, resume_from, found)
    if named is not None and named.resolve().parent == output_dir.resolve():
        newer = [path for path in found if step_of(path) > step_of(named) and damage(path) is None]
        if newer:
            raise ValueError(
                f"{str(output_dir)!r} has a newer checkpoint, {newer[-1].name}, which going on from {named.name} would "
                "mix with the new ones. Move it away, or go on from the older one in another folder. Nothing was changed."
            )
        return named

    for path in reversed(found):
        wrong = damage(path)
        if wrong is None:
            return path
        report(f"{path} is damaged ({wrong}) and not used.")
    if found or (named is None and (output_dir / "model_index.json").exists()):
        raise ValueError(
            f"{str(output_dir)!r} holds a run, but no checkpoint of it can be used. To start again from the beginning, "
            "give another --output_dir. Nothing was changed."
        )
    if named is None and (origin := began_from(started)):
        raise ValueError(
            f"the run in {str(output_dir)!r} began from {origin} and has no checkpoint of its own yet: start it with "
            "that --resume_from_checkpoint again. Nothing was changed."
        )
    return named


def check_named(path: Path, name: str, found: list[Path]) -> None:
    if not (path / CHECKSUMS).is_file():
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(
            f"there is no complete checkpoint {name!r}; in the --output_dir there are: {names}. Nothing was changed."
        )
    if wrong := damage(path):
        raise ValueError(f"the checkpoint {name!r} is damaged: {wrong}. Nothing was changed.")


def began_from(started: Path) -> str | None:
    """The other run's checkpoint that a run was told to begin from, by its training_args.json."""
    try:
        origin = json.loads(started.read_text()).get("resume_from_checkpoint")
    except (OSError, ValueError, AttributeError):
        return None
    own = origin in (None, "latest") or (started.parent / origin).resolve().parent == started.parent.resolve()
    return None if own else origin


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def last_good(output_dir: Path) -> Path | None:
    """The newest checkpoint that was not written in a row of bad steps."""
    for path in reversed(checkpoints(output_dir)):
        if damage(path) is None and not json.loads((path / "progress.json").read_text())["watch"]["bad_in_row"]:
            return path
    return None


# ----------------------------------------------------------------------------------------------------------------------
# What is in them


def save_checkpoint(accelerator, output_dir, progress: dict, total_limit, *, model, optimizer, averages) -> Path:
    """
    Writes `output_dir/checkpoint-STEP`, then deletes the oldest ones over `total_limit`. All processes call it.

    Args:
        progress: JSON data with at least "step", "images_seen" and "settings".
        model, optimizer: as `accelerator.prepare` returned them.
        averages: has `state_dict()`, called by all processes, used on the main one.
    """
    path = Path(output_dir) / f"checkpoint-{progress['step']}"

    def write(folder: Path) -> None:
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            model.save_checkpoint(str(folder / "deepspeed"), tag="state")
        else:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(model, options=whole)
            state = get_optimizer_state_dict(model, bare(optimizer), options=whole)
            if accelerator.is_main_process:
                save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
                torch.save(state, folder / "optimizer.pt")
        averaged = averages.state_dict()
        if accelerator.is_main_process:
            torch.save(averaged, folder / "averages.pt")
            extra = {} if accelerator.scaler is None else {"grad_scaler": accelerator.scaler.state_dict()}
            (folder / "progress.json").write_text(json.dumps({**progress, **extra}))

    write_folder(path, write, accelerator)
    if accelerator.is_main_process:
        delete_old(Path(output_dir), progress["step"], total_limit)
    accelerator.wait_for_everyone()
    return path


def read_progress(path: Path, settings: dict, may_differ: Collection[str] = ()) -> dict:
    """
    A checkpoint's progress.json.

    Raises:
        ValueError: if the checkpoint was made with other `settings` (the seed, the data, the model) than those that
            `may_differ`.
    """
    progress = json.loads((path / "progress.json").read_text())
    changed = {
        key: f"{key} was {progress['settings'].get(key)!r}, is {value!r}"
        for key, value in settings.items()
        if progress["settings"].get(key) != value
    }
    if set(changed) - set(may_differ):
        forkable = not set(changed) - set(FORKS_MAY_CHANGE)
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(changed.values())}. "
            + (
                "To go on from it with these, give another --output_dir and it in --resume_from_checkpoint. "
                * forkable
            )
            + "Nothing was changed."
        )
    return progress


def load_checkpoint(accelerator, path: Path, settings: dict, may_differ=(), *, model, optimizer, averages) -> dict:
    """
    Loads what `save_checkpoint` wrote, on all processes, and returns its progress. Learning rates and other options of
    the optimizer's groups stay as they are.

    Raises:
        ValueError: if the checkpoint was made with other `settings` than those that `may_differ`, or by DeepSpeed and
            this run is not, or vice versa.
    """
    progress = read_progress(path, settings, may_differ)
    by_deepspeed = (path / "deepspeed").is_dir()
    if by_deepspeed != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        with_, without = ("with", "without") if by_deepspeed else ("without", "with")
        raise ValueError(f"{path} was written {with_} DeepSpeed; a run {without} it cannot go on from there.")
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
        set_optimizer_state_dict(model, bare(optimizer), state, options=whole)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    averages.load_state_dict(torch.load(path / "averages.pt", map_location="cpu", weights_only=True, mmap=True))
    if accelerator.scaler is not None and "grad_scaler" in progress:
        accelerator.scaler.load_state_dict(progress["grad_scaler"])
    return progress


def bare(optimizer) -> torch.optim.Optimizer:
    """Without accelerate's wrapping."""
    return getattr(optimizer, "optimizer", optimizer)
