"""Many images from a pipeline, for measuring it: one seed each, on several processes, resumable, as PNGs or one npz."""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size
from PIL import Image
from tqdm.auto import tqdm

from ..pipelines.pipeline_hdit import HDiTPipeline


SETTINGS_FILE = "sampling.json"
FIRST_BATCH_SIZE = {"cuda": 512, "cpu": 16}  # where "auto" begins; halved while the memory does not suffice


def image_seed(seed: int, index: int) -> int:
    """Of image number `index` in the run with this seed: below 2**32, since torch's CPU generator uses no more bits of a
    seed, and another one for each image of the run."""
    return (seed * 0x9E3779B1 + index) % 2**32


def draw_many(
    pipeline: HDiTPipeline,
    output: str | Path,
    num_images: int,
    *,
    class_labels: Sequence[int] | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    **arguments,
) -> None:
    """
    Draws image 0 to num_images - 1 and writes each as soon as it is there; called again, it draws what is missing.

    All processes of `accelerate launch` take part. Image i depends on its seed and label only: not on the batch, the
    number of processes or interruptions, up to the rounding of batched arithmetic.

    Args:
        pipeline: on this process's device.
        output: a folder for `000000.png`, ..., or a file that ends in .npz: `arr_0` uint8 `(N, H, W, C)` and, for a
            class-conditional model, `arr_1` int64 labels, as the evaluation of ADM reads it.
        class_labels: names or numbers; image i gets number i modulo their count; None draws without labels.
        batch_size: images at once and process, or "auto" for as many as the memory holds.
        **arguments: of the pipeline's call: num_inference_steps, guidance_scale, ..., as JSON can hold them.

    Raises:
        ValueError: for a folder that holds something else, or images of other settings; for an npz of another call; for
            a network with a cache, which would make an image depend on its batch.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}.")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer or 'auto', got {batch_size!r}.")
    if any(model.is_cache_enabled for model in networks(pipeline)):
        raise ValueError(
            "with a cache enabled an image depends on the others of its batch; call pipe.transformer.disable_cache() "
            "(and that of the guidance_model) first."
        )
    output, state = Path(output), PartialState()
    packed = output.suffix == ".npz"
    folder = output.with_name(f"{output.name}.parts") if packed else output
    if class_labels is not None:
        class_labels = pipeline.encode_labels(class_labels).tolist()
    labels = None if class_labels is None else [class_labels[i % len(class_labels)] for i in range(num_images)]
    settings = settings_of(pipeline, class_labels, seed, arguments)
    # What the npz says of itself: the same call again finds its work done.
    mark = hashlib.sha256(json.dumps([num_images, settings]).encode()).hexdigest().encode()
    if packed and output.exists():
        if mark_of(output) != mark:
            raise ValueError(f"{str(output)!r} is there already, of another call; nothing was changed.")
        if state.is_main_process and folder.exists():
            clear(folder, num_images)
        return
    # One process looks and writes; then the others find the same.
    with state.main_process_first():
        prepare_folder(folder, settings, write=state.is_main_process)
    todo = missing(folder, num_images)
    state.wait_for_everyone()  # all have looked before the first one writes
    mine = todo[state.process_index :: state.num_processes]
    draw = lambda size: draw_missing(pipeline, folder, mine, labels, size, seed, arguments)  # noqa: E731
    if batch_size == "auto":
        draw_with_auto_batch_size(draw, FIRST_BATCH_SIZE.get(pipeline.device.type, 64))
    else:
        draw(batch_size)
    state.wait_for_everyone()
    if packed and state.is_main_process:
        pack(folder, output, num_images, labels, mark)
        clear(folder, num_images)


def draw_with_auto_batch_size(draw, first: int) -> None:
    size = first

    def halved() -> int:
        nonlocal size
        size //= 2
        return size

    # Written images stay: the smaller batches go on after them.
    find_executable_batch_size(lambda batch_size: draw(batch_size), first, halved)()


def draw_missing(pipeline, folder: Path, indices, labels, batch_size: int, seed: int, arguments: dict) -> None:
    """Draws the images with these numbers that are not there yet."""
    indices = [i for i in indices if not path_of(folder, i).exists()]
    state = PartialState()
    shared = f" (process 0 of {state.num_processes})" if state.num_processes > 1 else ""
    bar = tqdm(total=len(indices), desc=f"Images{shared}", disable=not state.is_main_process)
    with without_progress_bar(pipeline), bar:
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            images = pipeline(
                None if labels is None else [labels[i] for i in part],
                num_images_per_prompt=len(part) if labels is None else 1,
                generator=[torch.Generator().manual_seed(image_seed(seed, i)) for i in part],
                **arguments,
            ).images
            for i, image in zip(part, images, strict=True):
                write(image, path_of(folder, i))
            bar.update(len(part))


@contextlib.contextmanager
def without_progress_bar(pipeline: HDiTPipeline):
    """The pipeline's own bar would come anew for each batch."""
    config = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**config)


def path_of(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def missing(folder: Path, num_images: int) -> list[int]:
    there = {path.name for path in folder.iterdir()}
    return [i for i in range(num_images) if path_of(folder, i).name not in there]


def write(image: Image.Image, path: Path) -> None:
    """The file gets its name when it is whole."""
    partial = path.with_suffix(".partial")
    image.save(partial, format="png")
    os.replace(partial, path)


def networks(pipeline: HDiTPipeline) -> list:
    return [model for model in (pipeline.transformer, pipeline.guidance_model) if model is not None]


def settings_of(pipeline: HDiTPipeline, class_labels: list[int] | None, seed: int, arguments: dict) -> dict:
    """What the images depend on, as JSON has it."""
    for name, value in {"seed": seed, **arguments}.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"{name} must be made of numbers, strings, lists and dicts, to be kept beside the images; got "
                f"{type(value).__name__}."
            ) from None
    scheduler = json.loads(pipeline.scheduler.to_json_string())
    scheduler.pop("_diffusers_version", None)
    settings = {
        "model": model_digest(pipeline),
        "scheduler": scheduler,
        "seed": seed,
        "class_labels": class_labels,
        "arguments": arguments,
    }
    return json.loads(json.dumps(settings))


def model_digest(pipeline: HDiTPipeline) -> str:
    digest = hashlib.sha256()
    for model in networks(pipeline):
        # Names with an underscore say where it came from and which version wrote it.
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def prepare_folder(folder: Path, settings: dict, write: bool) -> None:
    path = folder / SETTINGS_FILE
    partial = path.with_name(f"{path.name}.partial")
    if path.is_file() and any(folder.glob("*.png")):
        try:
            there = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} can't be read ({error}). Give another place. Nothing was changed."
            ) from None
        changed = [name for name in settings if there.get(name) != settings[name]]
        if changed:
            raise ValueError(
                f"{str(folder)!r} holds images with other {', '.join(changed)} (see {SETTINGS_FILE} there). Give another "
                "place, or the same settings to go on. Nothing was changed."
            )
    elif folder.exists() and not path.is_file() and (not folder.is_dir() or set(folder.iterdir()) - {partial}):
        raise ValueError(f"{str(folder)!r} is not an empty folder, nor one of this script's. Nothing was changed.")
    elif write:
        # Settings without an image are of a call that failed; they bind nobody.
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(partial, path)


def pack(folder: Path, output: Path, num_images: int, labels: list[int] | None, mark: bytes) -> None:
    """One npz out of the PNGs, image by image: the whole need not fit into memory."""
    with Image.open(path_of(folder, 0)) as image:
        first = np.asarray(image)
    shape = (num_images, *first.shape[:2], 1 if first.ndim == 2 else first.shape[2])
    partial = output.with_name(f"{output.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = mark
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for i in tqdm(range(num_images), desc="Packing", delay=2):
                with Image.open(path_of(folder, i)) as image:
                    file.write(np.asarray(image).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.array(labels, dtype=np.int64))
    os.replace(partial, output)


def mark_of(output: Path) -> bytes | None:
    """What `pack` left in the npz; None for another file."""
    if not zipfile.is_zipfile(output):
        return None
    with zipfile.ZipFile(output) as archive:
        return archive.comment


def clear(folder: Path, num_images: int) -> None:
    """Removes the packed images and what killed processes left."""
    for path in [*folder.glob("*.partial"), *(path_of(folder, i) for i in range(num_images))]:
        path.unlink(missing_ok=True)
    # Images beyond num_images are from an earlier, larger wish: they stay.
    if not any(folder.glob("*.png")):
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        folder.rmdir()
