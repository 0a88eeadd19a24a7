"""Trains a Hourglass Diffusion Transformer on your images and saves it as a pipeline.

    accelerate launch examples/train_hdit.py --config examples/configs/tiny.json --output_dir DIR [any flag]

A config is a JSON object whose keys are the flags below, plus "model": arguments of HDiTModel, and "scheduler":
sigma_min, sigma_max, sigma_data. Flags win over the config, the config over the preset. DIR gets the pipeline with the
averaged (EMA) weights, checkpoint-STEP folders to resume from, and samples/ with pictures on the way.
"""

import argparse
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_hdit import HDiTModel, diffusion, presets, training
from diffusers_hdit.data import ImageDataset, ShuffledBatches, load_images, to_float
from diffusers_hdit.ema import ema_weights, make_ema


# The faces that come with the project, to try everything with.
EMBEDDED_DATASETS = {"fluent-faces": Path(__file__).parent / "data" / "fluent_faces_64.png"}
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
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        is_number = action.type in (int, float) and action.nargs is None
        if is_number and value is not None and not isinstance(value, (int, float)):
            parser.error(f"{action.dest} in the config must be a number, got {value!r}.")
        if action.choices is not None and value is not None and value not in action.choices:
            parser.error(f"{action.dest} must be one of {', '.join(map(str, action.choices))}; got {value!r}.")

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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # Everything that can be refused is refused here, before anything is written or computed for long.
    checkpoint = training.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    with torch.device("meta"):
        resolution = HDiTModel(**args.model).sample_size
    accelerator = make_accelerator(args)
    set_seed(args.seed)
    dataset = open_dataset(args, accelerator, resolution)
    num_classes = len(dataset.id2label) if dataset.id2label is not None else None
    micro_batch = args.train_batch_size * accelerator.num_processes
    global_batch = micro_batch * args.gradient_accumulation_steps
    total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(dataset) / global_batch)
    batches = ShuffledBatches(
        len(dataset),
        args.train_batch_size,
        args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        crops=not args.center_crop,
    )
    pusher = training.make_pusher(args) if args.push_to_hub and accelerator.is_main_process else None

    model = HDiTModel(**{**args.model, "num_classes": num_classes})
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        training.parameter_groups(model, args.learning_rate, args.adam_weight_decay, args.mapping_lr_scale),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=accelerator.device.type in ("cuda", "cpu"),
    )
    # Not prepared: accelerate would step a prepared scheduler once for every process.
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    inner = accelerator.unwrap_model(model)
    if args.compile:
        inner.compile()
    ema = make_ema(inner, args.ema_decay)
    accelerator.register_for_checkpointing(lr_scheduler, ema)

    step, images_seen, runs_before, loss, averaged = 0, 0, [], None, None
    settings = {"seed": args.seed, "model": json.loads(inner.to_json_string()), "images": len(dataset)}
    if checkpoint is not None:
        progress = training.load_checkpoint(accelerator, checkpoint, settings)
        step, images_seen, runs_before = progress["step"], progress["images_seen"], progress.get("runs")
        ema.to(accelerator.device)
        accelerator.print(f"Going on from {checkpoint}: step {step}, {images_seen:,} images seen.")
    batches.start = images_seen
    parameters = sum(p.numel() for p in inner.parameters())
    accelerator.print(
        f"{parameters / 1e6:.1f}M parameters, {len(dataset):,} images at {resolution[0]}×{resolution[1]}"
        f"{f' in {num_classes} classes' if num_classes else ''}, {total_steps:,} steps of {global_batch} images, "
        f"precision {accelerator.mixed_precision}."
    )
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / "training_args.json").write_text(
            json.dumps({name: value for name, value in vars(args).items() if name != "hub_token"}, indent=2)
        )
    accelerator.init_trackers("train_hdit")

    def train_step() -> torch.Tensor:
        """One optimizer step on the next global batch; returns this process's mean loss, still on the device."""
        loss = 0.0
        for micro_step in range(args.gradient_accumulation_steps):
            batch = next(loader)
            first_image = images_seen + micro_step * micro_batch + accelerator.process_index * args.train_batch_size
            training.seed_step(args.seed, first_image)
            with accelerator.accumulate(model):
                losses = training.draw_and_compute_loss(
                    model,
                    to_float(batch["image"].to(accelerator.device, non_blocking=True)),
                    batch["label"].to(accelerator.device) if num_classes else None,
                    num_classes=num_classes,
                    image_size=max(resolution),
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
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            loss = loss + losses.detach().mean() / args.gradient_accumulation_steps
        lr_scheduler.step()
        ema.step(inner.parameters())
        return loss

    def runs() -> list[dict] | None:
        """Hardware and seconds of each uninterrupted part; None if a checkpoint did not say."""
        run = {"hardware": training.describe_hardware(accelerator), "seconds": time.perf_counter() - begin}
        return None if runs_before is None else [*runs_before, run]

    def save_checkpoint() -> None:
        progress = {"step": step, "images_seen": images_seen, "settings": settings, "runs": runs()}
        training.save_checkpoint(accelerator, args.output_dir, progress, args.checkpoints_total_limit)

    def save_samples(name: str) -> None:
        """Drawn by all processes alike: the others would only wait, and a sharded model needs them all."""
        with ema_weights(inner.eval(), ema):
            pipeline = training.make_pipeline(inner, args.scheduler, dataset.id2label)
            images = training.draw_validation_images(pipeline, args.num_validation_images, args.seed)
        inner.train()
        if accelerator.is_main_process:
            training.save_image_grid(images, Path(args.output_dir) / "samples" / f"{name}.png")

    def save_pipeline(folder: Path, samples: str) -> None:
        with ema_weights(inner.eval(), ema):
            training.make_pipeline(inner, args.scheduler, dataset.id2label).save_pretrained(folder)
        inner.train()
        training.save_facts(
            folder,
            args,
            samples=Path(args.output_dir) / "samples" / f"{samples}.png",
            embedded=args.dataset_name in EMBEDDED_DATASETS,
            images=len(dataset),
            steps=step,
            images_seen=images_seen,
            batch_size=global_batch,
            mixed_precision=accelerator.mixed_precision,
            runs=runs(),
            final_loss=loss,
            final_loss_steps=averaged,
        )

    pin_memory = accelerator.device.type == "cuda"
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=args.dataloader_num_workers, pin_memory=pin_memory))  # fmt: skip
    progress_bar = tqdm(total=total_steps, initial=step, disable=not accelerator.is_main_process, unit="step")
    losses, started = [], time.perf_counter()
    begin = started
    model.train()
    while step < total_steps:
        losses.append(train_step())
        step, images_seen = step + 1, images_seen + global_batch
        progress_bar.update()
        if step % LOG_EVERY == 0 or step == total_steps:
            loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            averaged = len(losses)
            rate = averaged * global_batch / (time.perf_counter() - started)
            lr = lr_scheduler.get_last_lr()[0]
            progress_bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {rate:.0f} images/s")
            accelerator.log({"loss": loss, "lr": lr, "images_per_second": rate}, step=step)
            losses, started = [], time.perf_counter()
        if step % args.checkpointing_steps == 0 or step == total_steps:
            save_checkpoint()
        if step % args.validation_steps == 0 and step < total_steps:
            save_samples(f"step-{step:07d}")
            if pusher is not None:
                save = functools.partial(save_pipeline, samples=f"step-{step:07d}")
                pusher.push(save, f"Step {step} of {total_steps}")
    progress_bar.close()

    save_samples("final")
    if accelerator.is_main_process:
        save_pipeline(Path(args.output_dir), "final")
        print(f"Saved the pipeline. HDiTPipeline.from_pretrained({args.output_dir!r}) draws images with it.")
    if pusher is not None:
        commit = pusher.finish(args.output_dir, f"End of training, {step} steps")
        if commit is not None:
            print(f"Pushed it to {commit.commit_url}")
    accelerator.end_training()


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    device = PartialState().device
    if (
        device.type == "cpu"
        and os.environ.get("OMP_NUM_THREADS") == "1"
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        # `accelerate launch` leaves one thread to a process unless told otherwise: share the cores out.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if args.allow_tf32 and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return Accelerator(
        mixed_precision=training.resolve_mixed_precision(args.mixed_precision, device),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )


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
