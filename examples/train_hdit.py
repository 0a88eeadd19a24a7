"""Trains a Hourglass Diffusion Transformer on your images and saves it as a pipeline.

    accelerate launch examples/train_hdit.py --config examples/configs/tiny.json --output_dir DIR [any flag]

A config is a JSON object whose keys are the flags below, plus "model": arguments of HDiTModel, and "scheduler":
sigma_min, sigma_max, sigma_data. Flags win over the config, the config over the preset. DIR gets the pipeline with the
averaged (EMA) weights, checkpoint-STEP folders to resume from, and samples/ with pictures on the way.
"""

import argparse
import functools
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, parse_flag_from_env, set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_hdit import HDiTModel, diffusion, presets, training
from diffusers_hdit.data import ImageDataset, ShuffledBatches, load_images, to_float
from diffusers_hdit.ema import ema_weights, make_ema


# The faces that come with the project, to try everything with.
EMBEDDED_DATASETS = {"fluent-faces": Path(__file__).parent / "data" / "fluent_faces_64.png"}
POSITIVE = ("resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs",
            "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "num_validation_images")  # fmt: skip
# A checkpoint brings these with it, so that another value would change nothing.
KEPT_BY_A_CHECKPOINT = ("learning_rate", "mapping_lr_scale", "lr_scheduler", "adam_beta1", "adam_beta2", "adam_epsilon",
                        "adam_weight_decay", "ema_decay")  # fmt: skip
LOG_EVERY = 10  # steps; each look at the loss makes an accelerator wait


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", help="JSON file with any of these flags")
    add("--preset", choices=presets.names(), help="model and training settings to start from")
    add("--output_dir", required=True, help="folder for the result; new, empty, or resumed")

    data = parser.add_argument_group("data").add_argument
    data("--train_data_dir", help="folder of images; its sub-folders are the classes if --label_column is given")
    data("--dataset_name", help="a Hugging Face dataset (Hub or local folder), or fluent-faces, which comes with this")
    data("--dataset_config_name")
    data("--cache_dir")
    data("--image_column", default="image")
    data("--label_column", help="train with class labels from this column")
    data("--resolution", type=int, nargs="+", help="one number, or height and width; default: the model's sample_size")
    data("--center_crop", action=yes_no, default=False, help="crop the middle instead of a random place")
    data("--random_flip", action=yes_no, default=False, help="mirror half of the images")
    data("--dataloader_num_workers", type=int, default=0)

    run = parser.add_argument_group("training").add_argument
    run("--train_batch_size", type=int, default=16, help="images a step and device")
    run("--gradient_accumulation_steps", type=int, default=1)
    run("--max_train_steps", type=int, help="optimizer steps; wins over --num_train_epochs")
    run("--num_train_epochs", type=int, default=100)
    run("--learning_rate", type=float, default=5e-4)
    run("--mapping_lr_scale", type=float, default=1 / 3, help="learning rate of the mapping network, relative")
    run("--lr_scheduler", choices=[s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT],
        default="constant_with_warmup")  # fmt: skip
    run("--lr_warmup_steps", type=int, default=100)
    run("--adam_beta1", type=float, default=0.9)
    run("--adam_beta2", type=float, default=0.95)
    run("--adam_weight_decay", type=float, default=0.01)
    run("--adam_epsilon", type=float, default=1e-8)
    run("--max_grad_norm", type=float, default=1.0)
    run("--ema_decay", type=float, default=0.9999)
    run("--noise_density", choices=list(diffusion.DENSITIES), default="cosine-interpolated")
    run("--loss_weighting", choices=list(diffusion.WEIGHTINGS), default="soft-min-snr")
    run("--label_dropout", type=float, default=0.1, help="share of labels left out, for classifier-free guidance")
    run(
        "--mixed_precision", choices=["auto", "no", "bf16", "fp16"], default="auto", help="auto: bf16 where it is fast"
    )
    run("--allow_tf32", action=yes_no, default=True)
    run("--gradient_checkpointing", action=yes_no, default=False, help="less memory, about a third more time")
    run("--compile", action=yes_no, default=False, help="torch.compile the model")
    run("--seed", type=int, default=0)

    out = parser.add_argument_group("saving and looking").add_argument
    out("--checkpointing_steps", type=int, default=5000)
    out("--checkpoints_total_limit", type=int, help="keep only the newest ones")
    out("--resume_from_checkpoint", help="'latest', or a checkpoint folder")
    out("--validation_steps", type=int, default=5000, help="draw pictures every so many steps")
    out("--num_validation_images", type=int, default=16)
    out("--report_to", default="none", help="tensorboard, wandb, ... (accelerate's trackers), or none")
    out("--logging_dir", default="logs", help="inside the output folder")

    hub = parser.add_argument_group("Hugging Face Hub").add_argument
    hub("--push_to_hub", action=yes_no, default=False, help="push the pipeline, in the background, at each validation")
    hub("--hub_model_id", help="USER/NAME; default: the name of the output folder")
    hub("--hub_token", help="default: the one of `hf auth login`, or HF_TOKEN")
    hub("--hub_private_repo", action=yes_no, default=None, help="make the repository a private one")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over the config file over the preset; `args.model` and `args.scheduler` are complete afterwards."""
    parser = make_parser()
    first, _ = parser.parse_known_args(argv)
    config = read_config(parser, first.config) if first.config else {}
    name = first.preset or config.get("preset")
    if name is not None and name not in presets.names():
        parser.error(f"there is no preset {name!r}; the presets are {', '.join(presets.names())}.")
    preset = presets.load(name) if name else {"model": {}, "scheduler": {}, "training": {}}
    model, scheduler = ({**preset[key], **config.pop(key, {})} for key in ("model", "scheduler"))
    parser.set_defaults(**{**preset["training"], **config})
    args = parser.parse_args(argv)
    check_args(parser, args)
    unknown = sorted(set(model) - set(inspect.signature(HDiTModel.__init__).parameters))
    if unknown:
        parser.error(f'the config\'s "model" has unknown keys: {", ".join(unknown)}.')
    if model.get("mapping_cond_dim") or model.get("out_channels") not in (None, model.get("in_channels", 3)):
        parser.error("this script trains models with as many output as input channels and without a mapping_cond.")
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --train_data_dir or --dataset_name.")
    hub_flags = [name for name in ("hub_model_id", "hub_token", "hub_private_repo") if getattr(args, name)]
    if hub_flags and not args.push_to_hub:
        parser.error(f"--{hub_flags[0]} does nothing without --push_to_hub.")
    args.model = {"sample_size": 256, **model}
    args.scheduler = {"sigma_min": 0.01, "sigma_max": 160.0, "sigma_data": 0.5, **scheduler}
    args.sigma_data = args.scheduler["sigma_data"]
    if args.resolution:
        args.model["sample_size"] = args.resolution[0] if len(args.resolution) == 1 else args.resolution
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What argparse does not check: that counts are positive, and the types of values from a config file."""
    if isinstance(args.resolution, int):
        args.resolution = [args.resolution]
    for action in parser._actions:
        name, value = action.dest, getattr(args, action.dest, None)
        if value is None:
            continue
        kinds = {int: ("a whole number", int), float: ("a number", (int, float))}
        wanted, kind = kinds.get(action.type, ("a text", str))
        if isinstance(action, argparse.BooleanOptionalAction):
            wanted, kind = "true or false", bool
        values = value if name == "resolution" and isinstance(value, list) else [value]
        if not all(isinstance(v, kind) and (kind is bool or not isinstance(v, bool)) for v in values):
            parser.error(f"{name} must be {wanted}, got {value!r}.")
        if action.choices is not None and value not in action.choices:
            parser.error(f"{name} must be one of {', '.join(map(str, action.choices))}; got {value!r}.")
        if name in POSITIVE and min(values) < 1:
            parser.error(f"{name} must be at least 1, got {value!r}.")
    if args.resolution is not None and len(args.resolution) not in (1, 2):
        parser.error(f"resolution must be one number, or height and width; got {args.resolution}.")


def read_config(parser: argparse.ArgumentParser, path: str) -> dict:
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--config {path!r} is not a readable JSON file: {error}")
    known = {action.dest for action in parser._actions} - {"config", "help"} | {"model", "scheduler"}
    unknown = sorted(set(config) - known)
    if unknown:
        parser.error(f"--config {path!r} has unknown keys: {', '.join(unknown)}. Allowed: {', '.join(sorted(known))}.")
    return config


@dataclass
class Run:
    """Everything that a training run consists of; `step` and `images_seen` are where it stands."""

    args: argparse.Namespace
    accelerator: Accelerator
    dataset: ImageDataset
    network: HDiTModel  # bare
    model: torch.nn.Module  # the same, as accelerate wraps it
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel
    global_batch: int
    total_steps: int
    step: int = 0
    images_seen: int = 0
    # What only the model card asks for: the mean loss of the last `averaged` steps, when this part of the training
    # began, the parts before it (None if a checkpoint did not say), and what pushes.
    loss: float | None = None
    averaged: int | None = None
    began: float = 0.0
    earlier_parts: list | None = field(default_factory=list)
    pusher: training.BackgroundPush | None = None

    @property
    def parts(self) -> list[dict] | None:
        """Hardware and seconds of each uninterrupted part of the training."""
        part = {
            "hardware": training.describe_hardware(self.accelerator),
            "seconds": time.perf_counter() - self.began,
        }
        return None if self.earlier_parts is None else [*self.earlier_parts, part]

    @property
    def settings(self) -> dict:
        """What must not change when a checkpoint is resumed."""
        settings = {"seed": self.args.seed, "images": len(self.dataset)}
        settings.update((name, getattr(self.args, name)) for name in KEPT_BY_A_CHECKPOINT)
        model = json.loads(self.network.to_json_string())
        settings.update((f"model.{name}", value) for name, value in model.items() if not name.startswith("_"))
        return settings

    def batches(self) -> ShuffledBatches:
        return ShuffledBatches(
            len(self.dataset),
            self.args.train_batch_size,
            self.args.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start=self.images_seen,
            crops=not self.args.center_crop,
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Everything that can be refused is refused here, before anything is written or computed for long.
    checkpoint = training.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    with torch.device("meta"):
        resolution = HDiTModel(**args.model).sample_size
    training.make_scheduler(args.scheduler)
    accelerator = make_accelerator(args)
    run = prepare(args, accelerator, open_dataset(args, accelerator, resolution))
    run.batches()

    if checkpoint is not None:
        progress = training.load_checkpoint(accelerator, checkpoint, run.settings)
        run.step, run.images_seen = progress["step"], progress["images_seen"]
        run.earlier_parts = progress.get("parts")
        run.ema.to(accelerator.device)
        accelerator.print(f"Going on from {checkpoint}: step {run.step}, {run.images_seen:,} images seen.")
    if args.push_to_hub and accelerator.is_main_process:
        run.pusher = training.make_pusher(args)
    parameters, classes = sum(p.numel() for p in run.network.parameters()), run.network.config.num_classes
    accelerator.print(
        f"{parameters / 1e6:.1f}M parameters, {len(run.dataset):,} images at {resolution[0]}×{resolution[1]}"
        f"{f' in {classes} classes' if classes else ''}, {run.total_steps:,} steps of {run.global_batch} images, "
        f"precision {accelerator.mixed_precision}."
    )
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / "training_args.json").write_text(
            json.dumps({name: value for name, value in vars(args).items() if name != "hub_token"}, indent=2)
        )
    accelerator.init_trackers("train_hdit")

    train(run)
    save_samples(run, "final")
    if accelerator.is_main_process:
        save_pipeline(run, Path(args.output_dir), "final")
        print(f"Saved the pipeline. HDiTPipeline.from_pretrained({args.output_dir!r}) draws images with it.")
    if run.pusher is not None:
        commit = run.pusher.finish(args.output_dir, f"End of training, {run.step} steps")
        if commit is not None:
            print(f"Pushed it to {commit.commit_url}")
    accelerator.end_training()


def prepare(args: argparse.Namespace, accelerator: Accelerator, dataset: ImageDataset) -> Run:
    set_seed(args.seed)
    network = HDiTModel(**{**args.model, "num_classes": len(dataset.id2label) if dataset.id2label else None})
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if args.compile:
        network.compile()
    optimizer = torch.optim.AdamW(
        training.parameter_groups(network, args.learning_rate, args.adam_weight_decay, args.mapping_lr_scale),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=accelerator.device.type in ("cuda", "cpu"),
    )
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(dataset) / global_batch)
    # Not prepared: accelerate would step a prepared scheduler once for every process.
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, total_steps)
    model, optimizer = accelerator.prepare(network, optimizer)
    ema = make_ema(network, args.ema_decay)
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    return Run(args, accelerator, dataset, network, model, optimizer, lr_scheduler, ema, global_batch, total_steps)


def train(run: Run) -> None:
    """From where the run stands to its last step, with checkpoints and pictures on the way."""
    args, accelerator = run.args, run.accelerator
    loader = DataLoader(
        run.dataset,
        batch_sampler=run.batches(),
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    progress_bar = tqdm(total=run.total_steps, initial=run.step, disable=not accelerator.is_main_process, unit="step")
    batches, losses, started = iter(loader), [], time.perf_counter()
    run.began = started
    run.model.train()
    while run.step < run.total_steps:
        losses.append(train_step(run, batches))
        progress_bar.update()
        validating = run.step % args.validation_steps == 0
        if run.step % LOG_EVERY == 0 or validating or run.step == run.total_steps:
            run.loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            run.averaged = len(losses)
            rate = run.averaged * run.global_batch / (time.perf_counter() - started)
            lr = run.lr_scheduler.get_last_lr()[0]
            progress_bar.set_postfix_str(f"loss {run.loss:.4f}, lr {lr:.1e}, {rate:.0f} images/s")
            accelerator.log({"loss": run.loss, "lr": lr, "images_per_second": rate}, step=run.step)
            losses, started = [], time.perf_counter()
        if run.step % args.checkpointing_steps == 0 or run.step == run.total_steps:
            progress = {"step": run.step, "images_seen": run.images_seen, "settings": run.settings, "parts": run.parts}
            training.save_checkpoint(accelerator, args.output_dir, progress, args.checkpoints_total_limit)
        if validating and run.step < run.total_steps:
            save_samples(run, f"step-{run.step:07d}")
            if run.pusher is not None:
                save = functools.partial(save_pipeline, run, samples=f"step-{run.step:07d}")
                run.pusher.push(save, f"Step {run.step} of {run.total_steps}")
            started = time.perf_counter()
    progress_bar.close()


def train_step(run: Run, batches: Iterator[dict]) -> torch.Tensor:
    """One optimizer step on the next global batch; returns this process's mean loss, still on the device."""
    args, accelerator = run.args, run.accelerator
    mean_loss = 0.0
    for micro_step in range(args.gradient_accumulation_steps):
        batch = next(batches)
        training.seed_step(args.seed, run.images_seen + accelerator.process_index * args.train_batch_size)
        with accelerator.accumulate(run.model):
            losses = training.draw_and_compute_loss(
                run.model,
                to_float(batch["image"].to(accelerator.device, non_blocking=True)),
                batch["label"].to(accelerator.device, non_blocking=True) if "label" in batch else None,
                num_classes=run.network.config.num_classes,
                image_size=max(run.dataset.resolution),
                strata={
                    "rank": accelerator.process_index,
                    "world_size": accelerator.num_processes,
                    "micro_step": micro_step,
                    "micro_steps": args.gradient_accumulation_steps,
                },
                args=args,
            )
            accelerator.backward(losses.mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
        mean_loss = mean_loss + losses.detach().mean() / args.gradient_accumulation_steps
        run.images_seen += run.global_batch // args.gradient_accumulation_steps
    run.lr_scheduler.step()
    run.ema.step(run.network.parameters())
    run.step += 1
    return mean_loss


def save_samples(run: Run, name: str) -> None:
    """Drawn by all processes alike: the others would only wait."""
    with ema_weights(run.network.eval(), run.ema):
        pipeline = training.make_pipeline(run.network, run.args.scheduler, run.dataset.id2label)
        images = training.draw_validation_images(pipeline, run.args.num_validation_images, run.args.seed)
    run.network.train()
    if run.accelerator.is_main_process:
        training.save_image_grid(images, Path(run.args.output_dir) / "samples" / f"{name}.png")


def save_pipeline(run: Run, folder: Path, samples: str) -> None:
    """With what its model card says; `samples` is the name of the picture that shows these weights."""
    with ema_weights(run.network.eval(), run.ema):
        training.make_pipeline(run.network, run.args.scheduler, run.dataset.id2label).save_pretrained(folder)
    run.network.train()
    training.save_facts(
        folder,
        run.args,
        samples=Path(run.args.output_dir) / "samples" / f"{samples}.png",
        embedded=run.args.dataset_name in EMBEDDED_DATASETS,
        images=len(run.dataset),
        steps=run.step,
        images_seen=run.images_seen,
        batch_size=run.global_batch,
        mixed_precision=run.accelerator.mixed_precision,
        runs=run.parts,
        final_loss=run.loss,
        final_loss_steps=run.averaged,
    )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    # Said explicitly: several processes on a CPU would not find each other otherwise.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Checking many images for the first time can take long, and the other processes wait for it.
    device = PartialState(cpu=cpu, timeout=timedelta(hours=4)).device
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        # `accelerate launch` leaves one thread to a process unless told otherwise: share the cores out.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if args.allow_tf32 and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=training.resolve_mixed_precision(args.mixed_precision, device),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )
    if args.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to {args.report_to}: that package is not installed.")
    return accelerator


def open_dataset(args: argparse.Namespace, accelerator: Accelerator, resolution: tuple[int, int]) -> ImageDataset:
    embedded = EMBEDDED_DATASETS.get(args.dataset_name)
    # One process checks the images, the others find its verdict.
    with accelerator.main_process_first():
        return load_images(
            train_data_dir=embedded or args.train_data_dir,
            dataset_name=None if embedded else args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            cache_dir=args.cache_dir,
            image_column=args.image_column,
            label_column=args.label_column,
            resolution=resolution,
            in_channels=args.model.get("in_channels", 3),
            center_crop=args.center_crop,
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
