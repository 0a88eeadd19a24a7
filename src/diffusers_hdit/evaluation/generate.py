"""Generating numbered images with a pipeline: each from a seed of its own, on any number of processes, resumable."""

import contextlib
import hashlib
import json
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data import load_images
from ..pipelines.pipeline_hdit import HDiTPipeline
from ..utils.files import atomic_path, write_atomically
from .image_grid import image_grid


SETTINGS_FILE = "sampling.json"
FIRST_BATCH_SIZE = {"cuda": 512, "cpu": 16}  # where "auto" begins; halved while the memory does not suffice


def image_seed(seed: int, index: int) -> int:
    """Return the seed of image `index` in the run with this seed: different for each image of a run, and below 2**32,
    since torch's CPU generator uses no more bits of a seed."""
    return (seed * 0x9E3779B1 + index) % 2**32


def generate_batch(
    pipeline: HDiTPipeline, indices: Sequence[int], seed: int, conditions: Mapping[str, Tensor], **arguments
) -> list | Tensor:
    """
    Generate the images with these indices.

    Args:
        conditions: arguments of the pipeline's call with an entry for each index that there is, such as class_labels.
        **arguments: other arguments of the pipeline's call.

    Returns:
        The pipeline's images; an image does not depend on the others but for the rounding of batched arithmetic.
    """
    indices = list(indices)
    with without_progress_bar(pipeline):
        return pipeline(
            **{name: values[indices] for name, values in conditions.items()},
            num_images_per_prompt=1 if conditions else len(indices),
            generator=[torch.Generator().manual_seed(image_seed(seed, i)) for i in indices],
            **arguments,
        ).images


@contextlib.contextmanager
def without_progress_bar(pipeline: HDiTPipeline) -> Iterator[None]:
    """Hide the pipeline's own bar, which would start again for each batch."""
    config = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**config)


# ----------------------------------------------------------------------------------------------------------------------
# Many images, a file each


def generate_images(
    pipeline: HDiTPipeline,
    output: str | Path,
    num_images: int,
    *,
    class_labels: Sequence[int | str] | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    **arguments,
) -> None:
    """
    Generate images 0 to num_images - 1, and write each as soon as it is there. The same call again generates those that
    are missing.

    All processes of `accelerate launch` take part. An image depends on its index, label and the seed only: not on the
    batch, the number of processes or interruptions, up to the rounding of batched arithmetic.

    Args:
        pipeline: on this process's device.
        output: a folder for `000000.png`, ..., or a file that ends in .npz: `arr_0` uint8 `(N, H, W, C)` and, for a
            class-conditional model, `arr_1` int64 labels, as the evaluation suite of ADM reads it.
        class_labels: names or numbers; image i gets entry i modulo their count. None generates without labels.
        batch_size: images per batch and process, or "auto" for as many as fit into memory.
        **arguments: of the pipeline's call (num_inference_steps, guidance_scale, ...), as JSON can hold them.

    Raises:
        ValueError: for a folder that holds something else, or images of other settings; for an npz of another call; for
            a network with a cache, which would make an image depend on its batch.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}.")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer or 'auto', got {batch_size!r}.")
    if any(network.is_cache_enabled for network in networks(pipeline)):
        raise ValueError(
            "with a cache enabled an image depends on the others of its batch; call pipe.transformer.disable_cache() "
            "(and that of the guidance_model) first."
        )
    output, state = Path(output), PartialState()
    packed = output.suffix == ".npz"
    folder = output.with_name(f"{output.name}.parts") if packed else output
    conditions = {}
    if class_labels is not None:
        class_labels = pipeline.encode_labels(class_labels).tolist()
        conditions["class_labels"] = torch.tensor([class_labels[i % len(class_labels)] for i in range(num_images)])
    settings = settings_of(pipeline, class_labels, seed, arguments)
    # The comment in the npz, by which the same call finds its work done.
    comment = hashlib.sha256(json.dumps([num_images, settings]).encode()).hexdigest().encode()
    if packed and output.exists():
        if npz_comment(output) != comment:
            raise ValueError(f"{str(output)!r} was written by another call; give another name. Nothing was changed.")
        if state.is_main_process and folder.exists():
            remove_packed(folder, num_images)
        return
    # One process looks and writes; then the others find the same.
    with state.main_process_first():
        prepare_folder(folder, settings, write=state.is_main_process)
    present = {path.name for path in folder.iterdir()}
    missing = [i for i in range(num_images) if image_path(folder, i).name not in present]
    state.wait_for_everyone()  # all have looked before the first one writes
    own = missing[state.process_index :: state.num_processes]

    def generate(batch_size: int) -> None:
        generate_missing(pipeline, folder, own, batch_size, seed, conditions, arguments)

    if batch_size == "auto":
        first = FIRST_BATCH_SIZE.get(pipeline.device.type, 64)
        halves = (first >> i for i in range(1, first.bit_length() + 1))
        find_executable_batch_size(lambda batch_size: generate(batch_size), first, halves.__next__)()
    else:
        generate(batch_size)
    state.wait_for_everyone()
    if packed and state.is_main_process:
        pack(folder, output, num_images, conditions.get("class_labels"), comment)
        remove_packed(folder, num_images)


def generate_missing(
    pipeline: HDiTPipeline,
    folder: Path,
    indices: Sequence[int],
    batch_size: int,
    seed: int,
    conditions: Mapping[str, Tensor],
    arguments: Mapping,
) -> None:
    """Generate and write the images with these indices that are not in the folder yet."""
    indices = [i for i in indices if not image_path(folder, i).exists()]
    state = PartialState()
    shared = f" (process 0 of {state.num_processes})" if state.num_processes > 1 else ""
    with tqdm(total=len(indices), desc=f"Images{shared}", disable=not state.is_main_process) as bar:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            images = generate_batch(pipeline, batch, seed, conditions, **arguments)
            for i, image in zip(batch, images, strict=True):
                write_image(image, image_path(folder, i))
            bar.update(len(batch))


def image_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def write_image(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as partial:
        image.save(partial, format="png")


def networks(pipeline: HDiTPipeline) -> list:
    return [model for model in (pipeline.transformer, pipeline.guidance_model) if model is not None]


def settings_of(pipeline: HDiTPipeline, class_labels: list[int] | None, seed: int, arguments: dict) -> dict:
    """Return what the images depend on, as JSON data."""
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
    """Return a hash of the networks' configurations and weights."""
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
    """
    Check that the images in a folder, if there are any, have these settings; otherwise write the settings into it.

    Raises:
        ValueError: for a folder with other images or something else.
    """
    path = folder / SETTINGS_FILE
    if path.is_file() and any(folder.glob("*.png")):
        try:
            present = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} can't be read ({error}). Give another place. Nothing was changed."
            ) from None
        changed = [name for name in settings if not isinstance(present, dict) or present.get(name) != settings[name]]
        if changed:
            raise ValueError(
                f"{str(folder)!r} holds images with other {', '.join(changed)} (see {SETTINGS_FILE} there). Give another "
                "place, or the same settings to resume. Nothing was changed."
            )
    elif folder.exists() and not path.is_file() and not is_empty(folder):
        raise ValueError(f"{str(folder)!r} is not an empty folder, nor one of this script's. Nothing was changed.")
    elif write:
        # Settings without an image are of a call that failed; they bind nobody.
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=2) + "\n")


def is_empty(folder: Path) -> bool:
    """Return whether nothing is in a folder but settings that were being written when their process was killed."""
    return folder.is_dir() and set(folder.iterdir()) == set(folder.glob(f".partial-*-{SETTINGS_FILE}"))


def pack(folder: Path, output: Path, num_images: int, labels: Tensor | None, comment: bytes) -> None:
    """Write one npz with the images of a folder, image by image: all of them need not fit into memory."""
    with Image.open(image_path(folder, 0)) as image:
        first = np.asarray(image)
    shape = (num_images, *first.shape[:2], 1 if first.ndim == 2 else first.shape[2])
    with atomic_path(output) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = comment
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for i in tqdm(range(num_images), desc="Packing", delay=2):
                with Image.open(image_path(folder, i)) as image:
                    file.write(np.asarray(image).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())


def npz_comment(path: Path) -> bytes | None:
    """Return what `pack` wrote into the npz; None for another file."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.comment


def remove_packed(folder: Path, num_images: int) -> None:
    """Remove the packed images, and what killed processes left."""
    for path in [*folder.glob(".partial-*"), *(image_path(folder, i) for i in range(num_images))]:
        path.unlink(missing_ok=True)
    # Images beyond num_images are from an earlier, larger call: they stay.
    if not any(folder.glob("*.png")):
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        folder.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# What `diffusers-hdit sample` does


def sample_files(args: Namespace) -> None:
    """Generate `args.num_images` images on all processes, a file each or packed into one npz."""
    # Processes wait for the slowest one, for longer than the 10 minutes after which NCCL gives up.
    state = PartialState(timeout=timedelta(days=7))
    pipeline = HDiTPipeline.from_pretrained(args.pipeline)
    pipeline.to(state.device)
    labels = None
    if pipeline.transformer.config.num_classes is not None or args.class_labels:
        labels = [label for _, label in class_rows(pipeline, args.class_labels)]
    generate_images(
        pipeline, args.output, args.num_images, class_labels=labels, batch_size=args.batch_size, seed=args.seed,
        num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
    )  # fmt: skip
    state.print(f"Wrote {args.num_images:,} images to {args.output}.")


def sample_grid(args: Namespace) -> None:
    """Generate a grid of images with a row for each class, below a row of real images if `args.real_images` is given."""
    if Path(args.output).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {args.output!r} must end in the extension of an image format, such as .png.")
    pipeline = HDiTPipeline.from_pretrained(args.pipeline)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    classes = class_rows(pipeline, args.class_labels)
    columns = args.images_per_class
    real = [("real", real_row(pipeline, args.real_images, columns))] if args.real_images else []
    labels = [label for _, label in classes for _ in range(columns)]
    conditions = {} if labels[0] is None else {"class_labels": torch.tensor(labels)}
    settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    images = []
    for start in tqdm(range(0, len(labels), args.batch_size), desc="Batches"):
        indices = range(start, min(start + args.batch_size, len(labels)))
        images += generate_batch(pipeline, indices, args.seed, conditions, **settings)
    rows = [(name, images[i * columns : (i + 1) * columns]) for i, (name, _) in enumerate(classes)]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    image_grid([*real, *rows], args.cell_size).save(args.output)
    print(f"Wrote {args.output}: {len(images)} images in {len(rows)} rows.")


def class_rows(pipeline: HDiTPipeline, class_labels: Sequence[str] | None) -> list[tuple[str, int | None]]:
    """Return the name and the class number of each row; the number is None for a model without classes."""
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        if class_labels:
            raise ValueError("--class_labels were given, but this model was trained without classes.")
        return [("", None)] * 4
    if class_labels is None:
        ids = list(range(num_classes))
    else:
        ids = pipeline.encode_labels([int(c) if c.isdecimal() else c for c in class_labels]).tolist()
    return [(pipeline.id2label.get(i, str(i)), i) for i in ids]


def real_row(pipeline: HDiTPipeline, source: str, count: int) -> list[Image.Image]:
    """Return real images, taken evenly from the source, as the network saw them."""
    config = pipeline.transformer.config
    dataset = load_images(
        train_data_dir=source, resolution=config.sample_size, in_channels=config.in_channels, center_crop=True
    )
    count = min(count, len(dataset))
    images = torch.stack([dataset[i * len(dataset) // count]["image"] for i in range(count)])
    return pipeline.image_processor.postprocess(images / 127.5 - 1, "pil")
