"""Trains a Hourglass Diffusion Transformer, or a baseline, on your images and saves it as a pipeline.

    accelerate launch examples/train_hdit.py --config examples/configs/tiny.json --output_dir DIR [any flag]

A config is a JSON object whose keys are the flags below, plus "model": arguments of HDiTModel (or of the network
that --model_type names), and "scheduler": sigma_min, sigma_max, sigma_data. Flags win over the config, the config over the preset. DIR gets the pipeline with the
averaged (EMA) weights, checkpoint-STEP folders, samples/ with pictures on the way, and metrics.jsonl. Interrupted, the
same command goes on where the run was.
"""

import argparse
import functools
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, is_tensorboard_available, parse_flag_from_env
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_hdit.data import Buckets, load_images, make_loader
from diffusers_hdit.evaluation import evaluator as evaluation
from diffusers_hdit.models.networks import NETWORKS
from diffusers_hdit.training import checkpointing as checkpoints
from diffusers_hdit.training import training
from diffusers_hdit.training.ema import Averages, save_snapshot
from diffusers_hdit.training.monitoring import LossBySigma, MetricsFile, StepRecord, Stopwatch, TrainingDiverged, Watch
from diffusers_hdit.training.training_args import SETTINGS, parse_args
from diffusers_hdit.utils.memory import keep_freed_memory


# The faces that come with the project, to try everything with.
EMBEDDED_DATASETS = {"fluent-faces": Path(__file__).parent / "data" / "fluent_faces_64.png"}


@dataclass
class Run:
    """Everything that a training run consists of; `step` and `images_seen` are where it stands."""

    args: argparse.Namespace
    accelerator: Accelerator
    dataset: torch.utils.data.Dataset
    network: ModelMixin  # bare
    model: torch.nn.Module  # the same, as accelerate wraps it
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    averages: Averages
    watch: Watch
    loss_by_sigma: LossBySigma
    validation_conditions: dict[str, Tensor]
    global_batch: int
    total_steps: int
    order: str = ""  # what the order of the images is drawn from
    step: int = 0
    images_seen: int = 0
    resumed_at: int = 0  # step
    unsaved: bool = False  # a checkpoint is due
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    metrics: MetricsFile | None = None
    evaluator: evaluation.MetricsOnTheWay | None = None
    # What only the model card asks for: the mean loss of the last `averaged` steps, when this part of the training
    # began, the parts before it (None if a checkpoint did not say), and what pushes.
    loss: float | None = None
    averaged: int | None = None
    began: float = 0.0
    earlier_parts: list | None = field(default_factory=list)
    pusher: training.BackgroundPush | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def parts(self) -> list[dict] | None:
        """Hardware and seconds of each uninterrupted part of the training."""
        if self.step == self.resumed_at:
            return self.earlier_parts
        part = {
            "hardware": training.describe_hardware(self.accelerator),
            "seconds": time.perf_counter() - self.began,
        }
        return None if self.earlier_parts is None else [*self.earlier_parts, part]

    @functools.cached_property
    def has_dropout(self) -> bool:
        return any(isinstance(module, torch.nn.Dropout) and module.p for module in self.network.modules())

    @property
    def settings(self) -> dict:
        """What must not change when a checkpoint is resumed."""
        settings = {name: getattr(self.args, name) for name in SETTINGS}
        settings |= {"data": self.dataset.identity, "order": self.order, "global_batch": self.global_batch}
        settings["mixed_precision"] = self.accelerator.mixed_precision
        if not self.args.lr_scheduler.startswith("constant"):
            settings["lr_schedule_steps"] = self.total_steps
        model = {name: value for name, value in self.network.config.items() if not name.startswith("_")}
        settings.update((f"model.{name}", value) for name, value in model.items())
        return json.loads(json.dumps(settings))  # as they come back from a file: lists, not tuples


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, __doc__)
    # Everything that can be refused is refused here, before anything is written or computed for long.
    with torch.device("meta"):
        NETWORKS[args.model_type](**args.model)
    training.make_scheduler(args.scheduler)
    accelerator = make_accelerator(args)
    find = functools.partial(checkpoints.find_checkpoint, args.output_dir, args.resume_from_checkpoint)
    checkpoint = checkpoints.on_main(accelerator, find, errors=(ValueError, OSError))  # it reads whole files
    run = prepare(args, accelerator, open_dataset(args, accelerator))
    loader = open_loader(run)
    if checkpoint is not None:
        resume(run, checkpoint)
        loader = open_loader(run)
    accelerator.print(training.plan(run, checkpoint))
    if args.dry_run:
        return
    if args.push_to_hub and accelerator.is_main_process:
        run.pusher = training.make_pusher(args)
    open_logs(run)

    try:
        finished = train(run, loader)
    except TrainingDiverged as error:
        good = checkpoints.on_main(accelerator, functools.partial(checkpoints.last_good, args.output_dir))
        sys.exit(
            f"error: {error}\n"
            + (f"The last good checkpoint is {good}." if good else "There was no good checkpoint yet.")
            + " A lower --learning_rate is the usual remedy: in another --output_dir, with --resume_from_checkpoint."
        )
    if finished:
        finish(run)
    # Also because PyTorch's gloo must not be taken down while its thread still lets go of a collective's tensors: both
    # would wait for Python's lock for ever.
    accelerator.wait_for_everyone()
    accelerator.end_training()


def prepare(args: argparse.Namespace, accelerator: Accelerator, dataset) -> Run:
    torch.manual_seed(args.seed)  # all processes begin with the same weights
    conditions = dataset.condition_columns
    network = NETWORKS[args.model_type](
        **{
            **args.model,
            "num_classes": len(dataset.id2label) if dataset.id2label else None,
            "mapping_cond_dim": len(conditions["names"]) + 1 if conditions else 0,
        }
    )
    network.set_gradient_checkpointing_levels(args.checkpointed_levels)
    if args.compile != "none":
        network.compile(mode=args.compile)
    optimizer = training.make_optimizer(network, args, accelerator.device)
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(dataset) / global_batch)
    # Not prepared: accelerate would step a prepared scheduler once for every process.
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, total_steps)
    training.adapt_plugins(accelerator, network, args)
    model, optimizer = accelerator.prepare(network, optimizer)
    training.skip_bad_steps(accelerator, optimizer)
    model.train()
    return Run(
        args,
        accelerator,
        dataset,
        network,
        model,
        optimizer,
        lr_scheduler,
        Averages(network, args.ema_decay, args.ema_lengths, **training.master_weights(accelerator)),
        Watch(accelerator.num_processes),
        LossBySigma(accelerator.device),
        training.validation_conditions(dataset, args.num_validation_images, args),
        global_batch,
        total_steps,
        evaluator=evaluation.metrics_on_the_way(args, dataset),
    )


def resume(run: Run, checkpoint: Path) -> None:
    is_fork = checkpoint.resolve().parent != run.output_dir.resolve()
    may_differ = checkpoints.FORKS_MAY_CHANGE if is_fork else ()
    parts = {"model": run.model, "optimizer": run.optimizer, "averages": run.averages}
    progress = checkpoints.load_checkpoint(run.accelerator, checkpoint, run.settings, may_differ, **parts)
    run.step, run.images_seen = progress["step"], progress["images_seen"]
    run.resumed_at, run.earlier_parts = run.step, progress["parts"]
    run.loss, run.averaged = progress["loss"], progress["averaged"]
    training.set_schedule(run.lr_scheduler, run.step)
    run.watch.load_state_dict(progress["watch"])
    if run.accelerator.is_main_process:
        run.loss_by_sigma.load_state(progress["loss_by_sigma"])


def open_loader(run: Run):
    args = run.args
    loader = make_loader(
        run.dataset,
        batch_size=args.train_batch_size,
        seed=args.seed,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        micro_steps=args.gradient_accumulation_steps,
        start=run.images_seen,
        num_workers=args.dataloader_num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
    )
    run.order = loader.batch_sampler.fingerprint
    return loader


def open_logs(run: Run) -> None:
    args, accelerator = run.args, run.accelerator
    if accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(run.output_dir)
        path = run.output_dir / "training_args.json"
        known = {name: value for name, value in vars(args).items() if name != "hub_token"}
        try:
            known["run_id"] = json.loads(path.read_text())["run_id"]
        except (OSError, ValueError, KeyError):
            known["run_id"] = uuid.uuid4().hex
        checkpoints.write_durably(path, json.dumps(known, indent=2))
        run.metrics = MetricsFile(run.output_dir / "metrics.jsonl", run.step)
        # A resumed run goes on in the same place.
        wandb = {"id": known["run_id"], "resume": "allow", "dir": args.output_dir}
        trackio = {"name": known["run_id"], "resume": "allow"}
        accelerator.init_trackers("train_hdit", init_kwargs={"wandb": wandb, "trackio": trackio})
    if run.evaluator is not None:
        run.evaluator.last_step = evaluation.from_main(lambda: run.metrics.last_step_with("metrics"))


def train(run: Run, loader) -> bool:
    """From where the run stands to its last step, with checkpoints and pictures on the way; False if asked to stop."""
    args, accelerator = run.args, run.accelerator
    progress_bar = tqdm(total=run.total_steps, initial=run.step, disable=not accelerator.is_main_process, unit="step")
    batches, run.began = iter(loader), time.perf_counter()
    with training.StopRequest(accelerator) as stop, progress_bar:
        if run.step:  # it may have ended between its checkpoint and these
            save_extras(run)
        run.stopwatch.reset()
        while run.step < run.total_steps:
            train_step(run, batches)
            progress_bar.update()
            stopping, last = stop.agreed(), run.step == run.total_steps
            if run.step % args.logging_steps == 0 or last:
                report(run, progress_bar)
            with run.stopwatch.pause():
                run.unsaved |= run.step % args.checkpointing_steps == 0 or stopping or last
                if run.unsaved:
                    save_checkpoint(run, whatever=stopping or last)
                if stopping and not last:
                    accelerator.print(f"\nStopped by {stop.name} after step {run.step}. {where_to_go_on(run)}")
                    return False
                save_extras(run)
    if run.unsaved:
        raise TrainingDiverged(f"the run ended with {run.watch.bad_in_row} bad steps in a row")
    return True


def save_extras(run: Run) -> None:
    """Snapshots of averages, metrics, pictures and pushes that are due at this step."""
    args = run.args
    if args.ema_lengths and run.step % (args.ema_snapshot_steps or args.checkpointing_steps) == 0:
        save_snapshot(run.averages, run.output_dir / "snapshots", run.step)
    if run.evaluator is not None and run.evaluator.is_due(run.step, run.total_steps):
        measure(run)
    if run.step % args.validation_steps == 0 and run.step < run.total_steps:
        save_samples(run, f"step-{run.step:07d}")
        push_on_the_way(run)


def train_step(run: Run, batches: Iterator[dict]) -> None:
    """One optimizer step on the next global batch."""
    args, accelerator = run.args, run.accelerator
    strata = {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "micro_steps": args.gradient_accumulation_steps,
    }
    done = []
    for micro_step in range(args.gradient_accumulation_steps):
        batch = run.stopwatch.wait_for(batches)
        # CUDA graphs may use the last step's memory again.
        torch.compiler.cudagraph_mark_step_begin()
        if run.has_dropout:
            training.seed_dropout(args.seed, batch["number"][0].item())
        with accelerator.accumulate(run.model):
            losses, sigmas = training.draw_and_compute_loss(
                run.model,
                batch,
                accelerator.device,
                num_classes=run.network.config.num_classes,
                image_size=max(run.dataset.resolution),
                strata={**strata, "micro_step": micro_step},
                args=args,
                autocast=accelerator.autocast,
                self_conditioning=run.network.config.get("self_conditioning", False),
            )
            loss = losses.mean()
            # A loss that is no number leaves gradients that are none: those are all that DeepSpeed looks at.
            accelerator.backward(loss * (1 + 0 * loss.detach()))
        done.append((losses.detach(), sigmas, batch["index"]))
    losses, sigmas, indices = (torch.cat(values) for values in zip(*done, strict=True))
    loss = accelerator.reduce(losses.mean(), "mean")
    values = training.clipped_step(accelerator, run.model, run.optimizer, loss, args.max_grad_norm)
    run.optimizer.zero_grad(set_to_none=True)
    run.lr_scheduler.step()
    run.averages.step()
    run.step, run.images_seen = run.step + 1, run.images_seen + run.global_batch
    run.stopwatch.steps += 1
    run.loss_by_sigma.add(sigmas, losses)
    run.watch.add(StepRecord(run.step, values, losses, sigmas, indices))


def report(run: Run, progress_bar: tqdm) -> None:
    """The steps since the last report: to the progress bar, metrics.jsonl and the trackers."""
    run.watch.catch_up()
    losses, grad_norms, lines = run.watch.take()
    by_sigma = run.loss_by_sigma.take(run.accelerator.reduce)
    seconds = run.stopwatch.seconds
    if losses:
        run.loss, run.averaged = sum(losses) / len(losses), len(losses)
    values = {
        "loss": run.loss if losses else None,
        "lr": run.lr_scheduler.get_last_lr()[0],
        "grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else None,
        "images_per_second": run.stopwatch.steps * run.global_batch / seconds,
        "data_wait": run.stopwatch.waited / seconds,
        "memory_gib": training.memory_in_use(run.accelerator.device) / 2**30,
        "skipped_steps": run.watch.bad,
    }
    run.stopwatch.reset()
    for line in lines:
        progress_bar.write(line) if run.accelerator.is_main_process else None
    if run.metrics is not None:
        run.metrics.add(step=run.step, images_seen=run.images_seen, **values, loss_by_sigma=by_sigma, notes=lines)
    known = {name: value for name, value in values.items() if value is not None}
    scalars = dict(zip((f"loss_by_sigma/{sigma:g}" for sigma in by_sigma["sigma"]), by_sigma["loss"], strict=True))
    run.accelerator.log({**known, **scalars}, step=run.step)
    progress_bar.set_postfix_str(
        f"loss {values['loss'] or math.nan:.4f}, lr {values['lr']:.1e}, {values['images_per_second']:.0f} images/s, "
        f"data {values['data_wait']:.0%}, {values['memory_gib']:.1f} GiB"
    )


def save_checkpoint(run: Run, whatever: bool) -> None:
    """
    Not in a row of bad steps, which a diverged network may have begun, unless `whatever` the last one was: a few of
    them changed nothing, and the next part of the run goes on counting.
    """
    run.watch.catch_up()
    if run.watch.bad_in_row and not whatever:
        return
    progress = {
        "step": run.step,
        "images_seen": run.images_seen,
        "settings": run.settings,
        "parts": run.parts,
        "loss": run.loss,
        "averaged": run.averaged,
        "watch": run.watch.state_dict(),
        "loss_by_sigma": run.loss_by_sigma.state(run.accelerator.reduce),
    }
    parts = {"model": run.model, "optimizer": run.optimizer, "averages": run.averages}
    # In a bad row none is deleted: one of the earlier ones is the last good one.
    limit = None if run.watch.bad_in_row else run.args.checkpoints_total_limit
    checkpoints.save_checkpoint(run.accelerator, run.output_dir, progress, limit, **parts)
    run.unsaved = False


def where_to_go_on(run: Run) -> str:
    if run.unsaved:
        return "That step was a bad one and not saved. The same command goes on from the checkpoint before it."
    return f"Saved checkpoint-{run.step}. The same command goes on from there."


def measure(run: Run) -> None:
    """Compares images of the averaged weights with the training set, on all processes."""
    run.network.eval()
    with run.averages.swapped():
        pipeline = training.make_pipeline(run.network, run.args)
        results = run.evaluator.measure(pipeline, run.step, run.accelerator.autocast)
    run.network.train()
    if results is not None:
        run.metrics.add(step=run.step, images_seen=run.images_seen, metrics=results)
        run.accelerator.log({f"metrics/{result['name']}": result["value"] for result in results}, step=run.step)


def save_samples(run: Run, name: str) -> None:
    """Drawn by all processes, each its share."""
    args = run.args
    run.network.eval()
    with run.averages.swapped():
        images = training.draw_validation_images(
            training.make_pipeline(run.network, args),
            run.validation_conditions,
            args.num_validation_images,
            args.seed,
            args.train_batch_size,
            run.accelerator,
        )
    run.network.train()
    if images is not None:
        grid = training.save_image_grid(images, run.output_dir / "samples" / f"{name}.png")
        training.log_picture(run.accelerator, grid, run.step)


def push_on_the_way(run: Run) -> None:
    if run.args.push_to_hub:
        weights = run.averages.full_state_dict()  # by all processes
        if run.pusher is not None:
            save = functools.partial(save_pipeline, run, weights=weights, samples=f"step-{run.step:07d}")
            run.pusher.push(save, f"Step {run.step} of {run.total_steps}")


def save_pipeline(run: Run, folder: Path, *, weights: dict[str, Tensor], samples: str) -> None:
    """With what its model card says; `samples` is the name of the picture that shows these weights."""
    network = training.averaged_network(run.network, weights)
    dataset = run.dataset
    pipeline = training.make_pipeline(network, run.args, dataset.id2label, dataset.condition_columns)
    pipeline.save_pretrained(folder)
    training.save_facts(
        folder,
        run.args,
        samples=run.output_dir / "samples" / f"{samples}.png",
        embedded=run.args.dataset_name in EMBEDDED_DATASETS,
        images=len(dataset) if dataset.has_length else None,
        steps=run.step,
        images_seen=run.images_seen,
        batch_size=run.global_batch,
        mixed_precision=run.accelerator.mixed_precision,
        runs=run.parts,
        final_loss=run.loss,
        final_loss_steps=run.averaged,
    )


def finish(run: Run) -> None:
    """Pictures and the pipeline; with several averages, those of the others in ema-NAME."""
    save_samples(run, "final")
    for name in run.averages.names[len(run.args.ema_decay) - 1 : 0 : -1] + run.averages.names[:1]:
        weights = run.averages.full_state_dict(name)
        if weights is not None:
            main = name == run.averages.names[0]
            folder = run.output_dir if main else run.output_dir / f"ema-{name}"
            save_pipeline(run, folder, weights=weights, samples="final")
    run.accelerator.print(
        f"Saved the pipeline. HDiTPipeline.from_pretrained({run.args.output_dir!r}) draws images with it."
    )
    if run.pusher is not None:
        commit = run.pusher.finish(run.args.output_dir, f"End of training, {run.step} steps")
        if commit is not None:
            print(f"Pushed it to {commit.commit_url}")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    # Said explicitly: several processes on a CPU would not find each other otherwise.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Checking many images for the first time can take long, and the other processes wait for it.
    device = PartialState(cpu=cpu, timeout=timedelta(hours=4)).device
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        # `accelerate launch` leaves one thread to a process unless told otherwise: share the cores out.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if device.type == "cpu":
        keep_freed_memory()
    if args.allow_tf32 and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    default = "tensorboard" if is_tensorboard_available() else "none"
    trackers = [] if (args.report_to or default) == "none" else (args.report_to or default).split(",")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=training.resolve_mixed_precision(args.mixed_precision, device),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise ValueError(
            f"accelerate was told of {accelerator.gradient_accumulation_steps} gradient accumulation steps, this script of "
            f"{args.gradient_accumulation_steps}: leave them out of the configuration of accelerate."
        )
    if missing := set(trackers) - {str(getattr(name, "value", name)) for name in accelerator.log_with}:
        raise ImportError(f"--report_to {args.report_to}: {', '.join(sorted(missing))} is not installed.")
    return accelerator


def open_dataset(args: argparse.Namespace, accelerator: Accelerator):
    embedded = EMBEDDED_DATASETS.get(args.dataset_name)
    with torch.device("meta"):
        network = NETWORKS[args.model_type](**args.model)
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    divisors, least = network.size_rule
    if args.task == "upscale":
        divisors = [math.lcm(divisor, args.upscale_factor) for divisor in divisors]
    # One process checks the images, the others find its verdict.
    with accelerator.main_process_first():
        return load_images(
            train_data_dir=embedded or args.train_data_dir,
            dataset_name=None if embedded else args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            cache_dir=args.cache_dir,
            image_column=args.image_column,
            label_column=args.label_column,
            condition_columns=args.condition_columns,
            condition_statistics=args.condition_statistics,
            resolution=network.sample_size,
            in_channels=network.config.in_channels,
            center_crop=args.center_crop,
            streaming=args.streaming,
            buckets=Buckets(tuple(divisors), least, min_images=global_batch) if args.buckets else None,
            cache_images={"auto": "auto", "yes": True, "no": False}[args.cache_images],
            num_classes=args.model.get("num_classes") if args.streaming else None,
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
