"""What `examples/train_hdit.py` is made of: parameter groups, reproducible draws, checkpoints, validation images."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from torch import Tensor, nn

from . import diffusion
from .data import mixed_seed
from .hub import BackgroundPush
from .model_card import TrainingFacts
from .pipeline_hdit import HDiTPipeline


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, mapping_lr_scale: float
) -> list[dict]:
    """
    Groups for AdamW as in the paper: weight decay on the matrices of attention, feed-forward, merges,
    splits, patches and adaptive norms; none on embeddings, Fourier projections, norms and scales. The mapping network
    and the adaptive norms that it feeds learn at `mapping_lr_scale` times the rate.
    """
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        mapping = ".mapping." in name or re.search(r"\.norm[12]\.linear\.", name) is not None
        embedding = name.startswith("conditioning.") and not mapping
        decays = parameter.ndim == 2 and not embedding
        groups.setdefault((mapping, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (mapping_lr_scale if mapping else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (mapping, decays), parameters in groups.items()
    ]


def resolve_mixed_precision(name: str, device: torch.device) -> str:
    """ "auto" -> "bf16" where the hardware multiplies bfloat16 matrices faster than float32 ones, else "no"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if device.type == "cpu" and has_amx() else "no"


# ----------------------------------------------------------------------------------------------------------------------
# One step


def draw_and_compute_loss(
    model, image: Tensor, labels: Tensor | None, *, num_classes: int | None, image_size: int, strata: dict, args
) -> Tensor:
    """
    Everything random of a step, from torch's default generators, then the loss of each image `(B,)`.

    Args:
        image: `(B, C, H, W)` in [-1, 1].
        labels: `(B,)` class numbers, or None.
        strata: this process's place in the global batch, arguments of `diffusion.stratified_uniform`.
        args: random_flip, label_dropout, noise_density, loss_weighting, sigma_data.
    """
    batch = len(image)
    if args.random_flip:
        flipped = torch.rand(batch, device=image.device) < 0.5
        image = torch.where(flipped[:, None, None, None], image.flip(3), image)
    conditions = {}
    if labels is not None:
        dropped = torch.rand(batch, device=labels.device) < args.label_dropout
        conditions["class_labels"] = torch.where(dropped, num_classes, labels)
    u = diffusion.stratified_uniform(batch, **strata)
    sigma = diffusion.sigma_from_uniform(u, args.noise_density, image_size=image_size, sigma_data=args.sigma_data)
    sigma = sigma.float()
    if image.device.type == "cuda":  # a copy from pageable memory would make every step wait for the device
        sigma = sigma.pin_memory()
    sigma = sigma.to(image.device, non_blocking=True)
    noise = torch.randn_like(image)
    return diffusion.loss(model, image, noise, sigma, args.sigma_data, args.loss_weighting, **conditions)


def seed_step(seed: int, image_number: int) -> None:
    """Makes all draws of a step, dropout included, a function of (seed, number of this process's first image)."""
    torch.manual_seed(mixed_seed("step", seed, image_number))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if (path / "progress.json").is_file()]
    # A name with more to it, such as checkpoint-500-backup, is somebody's own.
    steps = {path: match for path in found if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return sorted(steps, key=lambda path: int(steps[path][1]))


def save_checkpoint(accelerator, output_dir: Path, progress: dict, total_limit: int | None) -> Path:
    """
    Writes `output_dir/checkpoint-STEP` with all that accelerate knows of, on all processes, then deletes the oldest ones
    over `total_limit`. It gets its name only when it is whole, so that an interrupted write is never resumed from.
    """
    path = Path(output_dir) / f"checkpoint-{progress['step']}"
    partial = Path(output_dir) / f".partial-{path.name}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        for old in checkpoints(output_dir)[:-total_limit] if total_limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """
    The checkpoint that `--resume_from_checkpoint` names; None to start from the beginning.

    Raises:
        ValueError: if the folder holds something else than the run to go on with, or the checkpoint is not there.
    """
    output_dir, found = Path(output_dir), checkpoints(output_dir)

    def refuse_unless_empty() -> None:
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ValueError(
                f"--output_dir {str(output_dir)!r} is not an empty folder. Give another one, or go on with the run in it, "
                "if it holds one: --resume_from_checkpoint latest. Nothing was changed."
            )

    if resume_from is None:
        refuse_unless_empty()
        return None
    if resume_from == "latest":
        if not found and not (output_dir / "training_args.json").is_file():
            refuse_unless_empty()
        if not found and (output_dir / "model_index.json").exists():
            raise ValueError(
                f"{str(output_dir)!r} holds a pipeline but no checkpoint to go on from. Nothing was changed."
            )
        return found[-1] if found else None
    path = Path(resume_from) if Path(resume_from).is_dir() else output_dir / resume_from
    if not (path / "progress.json").is_file():
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(
            f"there is no complete checkpoint {resume_from!r}; in {str(output_dir)!r} there are: {names}."
        )
    if path.resolve().parent != output_dir.resolve():
        refuse_unless_empty()
    elif found[-1].name != path.name:
        raise ValueError(
            f"{str(output_dir)!r} has a newer checkpoint, {found[-1].name}, which going on from {path.name} would mix with "
            "the new ones. Move it away, or copy the older one into another folder and go on there. Nothing was changed."
        )
    return path


def load_checkpoint(accelerator, path: Path, settings: dict) -> dict:
    """
    Loads what `save_checkpoint` wrote and returns its progress.

    Raises:
        ValueError: if the checkpoint was made with other `settings` (the seed, the data, the model).
    """
    progress = json.loads((path / "progress.json").read_text())
    changed = [
        f"{key} was {progress['settings'].get(key)!r}, is {value!r}"
        for key, value in settings.items()
        if progress["settings"].get(key) != value
    ]
    if changed:
        raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}.")
    accelerator.load_state(str(path))
    return progress


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines


def make_scheduler(config: dict) -> EDMDPMSolverMultistepScheduler:
    """
    Raises:
        ValueError: for arguments that the scheduler does not take, or can't sample with.
    """
    try:
        scheduler = EDMDPMSolverMultistepScheduler(**config)
    except (TypeError, NotImplementedError, ValueError) as error:
        raise ValueError(f'the config\'s "scheduler" is wrong: {error}') from error
    if scheduler.config.algorithm_type == "sde-dpmsolver++" and scheduler.config.solver_order > 2:
        raise ValueError('the config\'s "scheduler" is wrong: sde-dpmsolver++ has solver_order 1 or 2 in Diffusers.')
    return scheduler


def make_pipeline(model, scheduler_config: dict, id2label: dict[int, str] | None) -> HDiTPipeline:
    return HDiTPipeline(model, make_scheduler(scheduler_config), id2label=id2label)


SAMPLE_STEPS = 50


def draw_validation_images(pipeline: HDiTPipeline, num_images: int, seed: int) -> list:
    """The same noise and labels each time, so that pictures of different steps can be compared."""
    pipeline.set_progress_bar_config(disable=True)
    num_classes = pipeline.transformer.config.num_classes
    labels = None if num_classes is None else [i % num_classes for i in range(num_images)]
    return pipeline(
        labels,
        num_images_per_prompt=num_images if labels is None else 1,
        num_inference_steps=SAMPLE_STEPS,
        generator=torch.Generator().manual_seed(seed),
    ).images


def save_image_grid(images: list, path: Path) -> None:
    """Writes images of one size as a picture with as many columns as rows, or more."""
    rows = next(n for n in range(math.isqrt(len(images)), 0, -1) if len(images) % n == 0)
    path.parent.mkdir(exist_ok=True)
    make_image_grid(images, rows=rows, cols=len(images) // rows).save(path)


# ----------------------------------------------------------------------------------------------------------------------
# The Hub


def make_pusher(args) -> BackgroundPush:
    """
    Args:
        args: output_dir, hub_model_id, hub_private_repo, hub_token.

    Raises:
        ValueError: for a name that the Hub would refuse.
    """
    folder = Path(args.output_dir).resolve()
    return BackgroundPush(
        args.hub_model_id or folder.name,
        private=args.hub_private_repo,
        token=args.hub_token,
        scratch=folder / ".on-its-way-to-the-hub",
    )


def describe_hardware(accelerator) -> str:
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    return name if accelerator.num_processes == 1 else f"{accelerator.num_processes} × {name}"


def save_facts(folder: Path, args, *, samples: Path, embedded: bool, **measured) -> None:
    """
    Writes what the model card says of a training beside its pipeline, and the picture of samples if it is elsewhere.

    Args:
        args: the flags of the training.
        embedded: whether the dataset came with the example, and is none of the Hub.
        measured: what the flags do not say, fields of `TrainingFacts`.
    """
    picture = Path(folder) / "samples" / samples.name
    if samples.is_file() and not picture.exists():
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(samples, picture)
    source = args.dataset_name or args.train_data_dir
    on_disk = Path(source).exists()
    name = Path(source).resolve().name if on_disk else source
    TrainingFacts(
        # Of a folder only its name: where it lies is nobody's business.
        dataset=name if args.dataset_config_name is None else f"{name} ({args.dataset_config_name})",
        dataset_id=None if on_disk or embedded else source,
        noise_density=args.noise_density,
        loss_weighting=args.loss_weighting,
        learning_rate=args.learning_rate,
        label_dropout=args.label_dropout if args.label_column else None,
        ema_decay=args.ema_decay,
        seed=args.seed,
        samples={
            "file": f"samples/{samples.name}",
            "images": args.num_validation_images,
            "steps": SAMPLE_STEPS,
            "seed": args.seed,
            "selected": False,
        },
        **measured,
    ).save(folder)
