"""A training run from its configuration to the saved pipeline: read it from the top to the bottom.

run_training: prepare everything, resume, then `train`: `train_step`, `report`, `save_checkpoint`, ... and `finish`.
"""

import functools
import inspect
import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .. import diffusion
from ..data import Buckets, load_images, make_loader
from ..evaluation.evaluator import InTrainingEvaluator
from ..models.networks import NETWORKS
from ..pipelines.upscaling import conditioning_channels
from ..utils.distributed import broadcast_from_main
from ..utils.files import check_writable, write_atomically
from . import checkpointing
from .config import TrainingConfig, names_where
from .distributed import (
    Stopped,
    StopRequest,
    adapt_plugins,
    describe_hardware,
    make_accelerator,
    master_weights,
    skip_bad_steps,
)
from .ema import EMAWeights, save_snapshot
from .monitoring import LossBySigma, MetricsFile, StepRecord, Stopwatch, TrainingDiverged, TrainingMonitor
from .objective import sample_and_compute_loss, seed_dropout
from .optimization import clipped_step, make_optimizer, set_schedule
from .saving import BackgroundPush, make_pipeline, make_pusher, make_scheduler, network_with_weights, save_metadata
from .summary import memory_in_use, run_summary
from .validation import generate_validation_images, log_grid, save_image_grid, validation_conditions


# The faces that come with this package, to try everything with.
BUNDLED_DATASETS = {"fluent-faces": Path(__file__).parents[1] / "data" / "fluent_faces_64.png"}


@dataclass
class TrainingRun:
    """Everything that a training run consists of; `step` and `images_seen` are how far it has come."""

    config: TrainingConfig
    accelerator: Accelerator
    dataset: torch.utils.data.Dataset
    network: ModelMixin  # as it was made
    model: torch.nn.Module  # the same, as accelerate wraps it
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAWeights
    monitor: TrainingMonitor
    loss_by_sigma: LossBySigma
    validation_conditions: dict[str, Tensor]
    global_batch: int
    total_steps: int
    sampler_fingerprint: str = ""
    step: int = 0
    images_seen: int = 0
    resumed_at: int = 0  # step
    saved_step: int = 0  # of the newest checkpoint of this session
    checkpoint_due: bool = False
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    metrics: MetricsFile | None = None
    evaluator: InTrainingEvaluator | None = None
    # For the model card: the mean loss of the last `loss_steps` steps, when this session of the training began, and the
    # sessions before it (None if a checkpoint does not tell).
    loss: float | None = None
    loss_steps: int | None = None
    began: float = 0.0
    earlier_sessions: list | None = field(default_factory=list)
    pusher: BackgroundPush | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def sessions(self) -> list[dict] | None:
        """Hardware and seconds of each uninterrupted session of the training."""
        if self.step == self.resumed_at:
            return self.earlier_sessions
        session = {"hardware": describe_hardware(self.accelerator), "seconds": time.perf_counter() - self.began}
        return None if self.earlier_sessions is None else [*self.earlier_sessions, session]

    @functools.cached_property
    def has_dropout(self) -> bool:
        return any(isinstance(module, torch.nn.Dropout) and module.p for module in self.network.modules())

    @property
    def settings(self) -> dict:
        """What must not change when a checkpoint is resumed; the names are those of `progress.json`."""
        kept = (*names_where(resume="fork"), *names_where(resume="fixed"))
        settings = {name: getattr(self.config, name) for name in kept}
        settings |= {
            "data": self.dataset.identity,
            "order": self.sampler_fingerprint,
            "global_batch": self.global_batch,
            "mixed_precision": self.accelerator.mixed_precision,
        }
        if not self.config.lr_scheduler.startswith("constant"):
            settings["lr_schedule_steps"] = self.total_steps
        model = {name: value for name, value in self.network.config.items() if not name.startswith("_")}
        settings.update((f"model.{name}", value) for name, value in model.items())
        return json.loads(json.dumps(settings))  # as they come back from a file: lists, not tuples


# ----------------------------------------------------------------------------------------------------------------------
# From the configuration to a run


def run_training(config: TrainingConfig) -> None:
    """
    Train and save a pipeline, or resume the run in `config.output_dir`. All processes call it.

    Raises:
        ValueError, OSError, ImportError: for whatever can be refused, before anything is written or computed for long.
        SystemExit: for a training that diverged, after naming the last good checkpoint.
    """
    check_network(config)
    accelerator = make_accelerator(config)
    find = functools.partial(checkpointing.find_checkpoint, config.output_dir, config.resume_from_checkpoint)
    checkpoint = broadcast_from_main(find, errors=(ValueError, OSError))  # it reads whole files
    broadcast_from_main(functools.partial(check_output_dir, config))  # two would remove the folder under each other
    run = prepare_run(config, accelerator, load_dataset(config, accelerator))
    loader = make_run_loader(run)
    if checkpoint is not None:
        resume(run, checkpoint)
        loader = make_run_loader(run)
    accelerator.print(run_summary(run, checkpoint))
    if config.dry_run:
        return
    if config.push_to_hub and accelerator.is_main_process:
        run.pusher = make_pusher(config)
    open_logs(run)

    try:
        finished = train(run, loader)
    except TrainingDiverged as error:
        good = broadcast_from_main(functools.partial(checkpointing.last_good, config.output_dir))
        sys.exit(
            f"error: {error}\n"
            + (f"The last good checkpoint is {good}." if good else "There was no good checkpoint yet.")
            + " A lower --learning_rate is the usual remedy: in another --output_dir, with --resume_from_checkpoint."
        )
    if finished:
        finish(run)
    # Also because PyTorch's gloo must not be shut down while its thread still releases a collective's tensors: both would
    # wait for Python's lock for ever.
    accelerator.wait_for_everyone()
    accelerator.end_training()


def check_network(config: TrainingConfig) -> None:
    """
    Complete the arguments of the network, and make it once without its weights.

    Raises:
        ValueError: for arguments that the network, the scheduler or the noise density do not take.
    """
    network_class, model = NETWORKS[config.model_type], config.model
    allowed = list(inspect.signature(network_class.__init__).parameters)[1:]
    if unknown := sorted(set(model) - set(allowed)):
        raise ValueError(
            f'the config\'s "model" has unknown keys: {", ".join(unknown)}. {network_class.__name__}, which --model_type '
            f"{config.model_type} trains, takes {', '.join(allowed)}."
        )
    own_conditioning = config.task != "upscale" and model.get("conditioning_channels")
    channels = model.get("in_channels", 3)
    if model.get("mapping_cond_dim") or own_conditioning or model.get("out_channels") not in (None, channels):
        raise ValueError(
            "models are trained with as many output as input channels; their mapping_cond is sized by "
            "--condition_columns, and their conditioning_channels by --task."
        )
    if config.task == "upscale":
        model["conditioning_channels"] = conditioning_channels(channels)
    if config.augment_prob and model.get("augment_cond_dim", 9) != 9:
        raise ValueError("--augment_prob needs a model with augment_cond_dim 9.")
    try:
        middle = torch.tensor(0.5, dtype=torch.float64)
        diffusion.sigma_from_uniform(middle, config.noise_density, **config.noise_density_params)
    except ValueError as error:
        raise ValueError(f"noise_density_params: {error}") from error
    try:
        meta_network(config)
    except TypeError as error:
        raise ValueError(f'the config\'s "model" has a value of a wrong type: {error}') from error
    make_scheduler(config.scheduler)


def check_output_dir(config: TrainingConfig) -> None:
    """Raise OSError unless files can be written into the output folder, or it can be made."""
    try:
        check_writable(Path(config.output_dir))
    except OSError as error:
        raise OSError(
            f"--output_dir {config.output_dir!r} cannot be written to ({error}). Give another one."
        ) from error


def meta_network(config: TrainingConfig) -> ModelMixin:
    """Make the network without memory for its weights."""
    with torch.device("meta"):
        return NETWORKS[config.model_type](**config.model)


def load_dataset(config: TrainingConfig, accelerator: Accelerator):
    """Return the training set; one process checks the images, and the others find its verdict."""
    bundled = BUNDLED_DATASETS.get(config.dataset_name)
    network = meta_network(config)
    divisors, min_size = network.size_rule
    if config.task == "upscale":
        divisors = [math.lcm(divisor, config.upscale_factor) for divisor in divisors]
    global_batch = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    with accelerator.main_process_first():
        return load_images(
            train_data_dir=bundled or config.train_data_dir,
            dataset_name=None if bundled else config.dataset_name,
            dataset_config_name=config.dataset_config_name,
            cache_dir=config.cache_dir,
            split=config.split,
            image_column=config.image_column,
            label_column=config.label_column,
            class_folder_depth=config.class_folder_depth,
            condition_columns=config.condition_columns,
            condition_statistics=config.condition_statistics,
            resolution=network.sample_size,
            in_channels=network.config.in_channels,
            center_crop=config.center_crop,
            streaming=config.streaming,
            buckets=Buckets(tuple(divisors), min_size, min_images=global_batch) if config.buckets else None,
            cache_images={"auto": "auto", "yes": True, "no": False}[config.cache_images],
            num_classes=config.model.get("num_classes") if config.streaming else None,
            max_unreadable=config.max_unreadable,
        )


def prepare_run(config: TrainingConfig, accelerator: Accelerator, dataset) -> TrainingRun:
    """Make the network, the optimizer and everything else of a run, at step 0."""
    torch.manual_seed(config.seed)  # all processes begin with the same weights
    columns = dataset.condition_columns
    network = NETWORKS[config.model_type](
        **{
            **config.model,
            "num_classes": len(dataset.id2label) if dataset.id2label else None,
            "mapping_cond_dim": len(columns["names"]) + 1 if columns else 0,  # and the presence flag
        }
    )
    network.set_gradient_checkpointing_levels(config.checkpointed_levels)
    if config.compile != "none":
        network.compile(mode=config.compile)
    optimizer = make_optimizer(network, config, accelerator.device)
    global_batch = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    total_steps = config.max_train_steps or math.ceil(config.num_train_epochs * len(dataset) / global_batch)
    # Not prepared: accelerate would step a prepared scheduler once for every process.
    lr_scheduler = get_scheduler(config.lr_scheduler, optimizer, None, config.lr_warmup_steps, total_steps)
    adapt_plugins(accelerator, network, config)
    model, optimizer = accelerator.prepare(network, optimizer)
    skip_bad_steps(accelerator, optimizer)
    model.train()
    return TrainingRun(
        config,
        accelerator,
        dataset,
        network,
        model,
        optimizer,
        lr_scheduler,
        EMAWeights(network, config.ema_decay, config.ema_sigma_rel, **master_weights(accelerator)),
        TrainingMonitor(accelerator.num_processes),
        LossBySigma(accelerator.device),
        validation_conditions(dataset, config.num_validation_images, config),
        global_batch,
        total_steps,
        evaluator=InTrainingEvaluator.from_args(config, dataset),
    )


def make_run_loader(run: TrainingRun):
    """Return the loader of the run's next batches."""
    config = run.config
    loader = make_loader(
        run.dataset,
        batch_size=config.train_batch_size,
        seed=config.seed,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        micro_steps=config.gradient_accumulation_steps,
        start=run.images_seen,
        num_workers=config.dataloader_num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
    )
    run.sampler_fingerprint = loader.batch_sampler.fingerprint
    return loader


def resume(run: TrainingRun, checkpoint: Path) -> None:
    """Load a checkpoint into the run."""
    is_fork = checkpoint.resolve().parent != run.output_dir.resolve()
    may_differ = checkpointing.FORKS_MAY_CHANGE if is_fork else ()
    state = {"model": run.model, "optimizer": run.optimizer, "ema": run.ema}
    progress = checkpointing.load_checkpoint(run.accelerator, checkpoint, run.settings, may_differ, **state)
    run.step, run.images_seen = progress["step"], progress["images_seen"]
    run.resumed_at = run.saved_step = run.step
    run.earlier_sessions = progress["parts"]
    run.loss, run.loss_steps = progress["loss"], progress["averaged"]
    set_schedule(run.lr_scheduler, run.step)
    run.monitor.load_state_dict(progress["watch"])
    if run.accelerator.is_main_process:
        run.loss_by_sigma.load_state(progress["loss_by_sigma"])


def open_logs(run: TrainingRun) -> None:
    """Write the configuration, and start `metrics.jsonl` and the trackers or continue them."""
    config, accelerator = run.config, run.accelerator
    if accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        checkpointing.remove_leftovers(run.output_dir)
        path = run.output_dir / "training_args.json"
        settings = config.to_dict()
        try:
            settings["run_id"] = json.loads(path.read_text())["run_id"]
        except (OSError, ValueError, KeyError):
            settings["run_id"] = uuid.uuid4().hex
        write_atomically(path, json.dumps(settings, indent=2), durable=True)
        run.metrics = MetricsFile(run.output_dir / "metrics.jsonl", run.step)
        wandb = {"id": settings["run_id"], "resume": "allow", "dir": config.output_dir}
        trackio = {"name": settings["run_id"], "resume": "allow"}
        accelerator.init_trackers("train_hdit", init_kwargs={"wandb": wandb, "trackio": trackio})
    if run.evaluator is not None:
        run.evaluator.last_step = broadcast_from_main(lambda: run.metrics.last_step_with("metrics"))


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: TrainingRun, loader) -> bool:
    """Take all remaining steps, with checkpoints and validation; return False if a signal stopped the run."""
    config, accelerator = run.config, run.accelerator
    progress_bar = tqdm(total=run.total_steps, initial=run.step, disable=not accelerator.is_main_process, unit="step")
    batches, run.began = iter(loader), time.perf_counter()
    with StopRequest(accelerator) as stop, progress_bar:
        try:
            if run.step:  # it may have ended between its checkpoint and these
                validate(run, stop.raise_if_agreed)
            run.stopwatch.reset()
            while run.step < run.total_steps:
                train_step(run, batches)
                progress_bar.update()
                last = run.step == run.total_steps
                if run.step % config.logging_steps == 0 or last:
                    report(run, progress_bar)
                with run.stopwatch.pause():
                    run.checkpoint_due |= run.step % config.checkpointing_steps == 0 or last
                    if run.checkpoint_due:
                        save_checkpoint(run, force=last)
                    if not last:
                        stop.raise_if_agreed()
                    validate(run, stop.raise_if_agreed)
        except Stopped:
            if run.saved_step != run.step:
                save_checkpoint(run, force=True)
            accelerator.print(f"\nStopped by {stop.name} after step {run.step}. {how_to_resume(run)}")
            return False
    if run.checkpoint_due:
        raise TrainingDiverged(f"the run ended with {run.monitor.consecutive_skips} skipped steps in a row")
    return True


def train_step(run: TrainingRun, batches: Iterator[dict]) -> None:
    """Take one optimizer step on the next global batch."""
    config, accelerator = run.config, run.accelerator
    results = []
    for micro_step in range(config.gradient_accumulation_steps):
        batch = run.stopwatch.wait_for(batches)
        # CUDA graphs may reuse the last step's memory.
        torch.compiler.cudagraph_mark_step_begin()
        if run.has_dropout:
            seed_dropout(config.seed, batch["number"][0].item())
        strata = {
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "micro_steps": config.gradient_accumulation_steps,
            "micro_step": micro_step,
        }
        with accelerator.accumulate(run.model):
            losses, sigmas = sample_and_compute_loss(
                run.model,
                batch,
                accelerator.device,
                config,
                num_classes=run.network.config.num_classes,
                image_size=max(run.dataset.resolution),
                strata=strata,
                autocast=accelerator.autocast,
                self_conditioning=run.network.config.get("self_conditioning", False),
            )
            loss = losses.mean()
            # A loss that is not finite makes all gradients so: DeepSpeed looks at nothing else.
            accelerator.backward(loss * (1 + 0 * loss.detach()))
        results.append((losses.detach(), sigmas, batch["index"]))
    losses, sigmas, indices = (torch.cat(values) for values in zip(*results, strict=True))
    loss = accelerator.reduce(losses.mean(), "mean")
    values = clipped_step(accelerator, run.model, run.optimizer, loss, config.max_grad_norm)
    run.optimizer.zero_grad(set_to_none=True)
    run.lr_scheduler.step()
    run.ema.step()
    run.step, run.images_seen = run.step + 1, run.images_seen + run.global_batch
    run.stopwatch.steps += 1
    run.loss_by_sigma.add(sigmas, losses)
    run.monitor.add(StepRecord(run.step, values, losses, sigmas, indices))


def report(run: TrainingRun, progress_bar: tqdm) -> None:
    """Send the steps since the last report to the progress bar, metrics.jsonl and the trackers."""
    run.monitor.flush()
    losses, grad_norms, messages = run.monitor.pop()
    by_sigma = run.loss_by_sigma.pop(run.accelerator.reduce)
    seconds = run.stopwatch.seconds
    if losses:
        run.loss, run.loss_steps = sum(losses) / len(losses), len(losses)
    values = {
        "loss": run.loss if losses else None,
        "lr": run.lr_scheduler.get_last_lr()[0],
        "grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else None,
        "images_per_second": run.stopwatch.steps * run.global_batch / seconds,
        "data_wait": run.stopwatch.waited / seconds,
        "memory_gib": memory_in_use(run.accelerator.device) / 2**30,
        "skipped_steps": run.monitor.skipped,
    }
    run.stopwatch.reset()
    if run.accelerator.is_main_process:
        for message in messages:
            progress_bar.write(message)
    if run.metrics is not None:
        run.metrics.add(step=run.step, images_seen=run.images_seen, **values, loss_by_sigma=by_sigma, notes=messages)
    known = {name: value for name, value in values.items() if value is not None}
    scalars = dict(zip((f"loss_by_sigma/{sigma:g}" for sigma in by_sigma["sigma"]), by_sigma["loss"], strict=True))
    run.accelerator.log({**known, **scalars}, step=run.step)
    progress_bar.set_postfix_str(
        f"loss {values['loss'] or math.nan:.4f}, lr {values['lr']:.1e}, {values['images_per_second']:.0f} images/s, "
        f"data {values['data_wait']:.0%}, {values['memory_gib']:.1f} GiB"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, validation and the end


def save_checkpoint(run: TrainingRun, force: bool) -> None:
    """
    Write a checkpoint, but not in a row of skipped steps, which a diverged network may have begun.

    `force` writes it even then: a few skipped steps changed nothing, and the resumed run continues to count them.
    """
    run.monitor.flush()
    if run.monitor.consecutive_skips and not force:
        return
    check_weights(run)
    progress = {
        "step": run.step,
        "images_seen": run.images_seen,
        "settings": run.settings,
        "parts": run.sessions,
        "loss": run.loss,
        "averaged": run.loss_steps,
        "watch": run.monitor.state_dict(),
        "loss_by_sigma": run.loss_by_sigma.state(run.accelerator.reduce),
    }
    # None is deleted in a row of skipped steps: one of the earlier ones is the last good one.
    limit = None if run.monitor.consecutive_skips else run.config.checkpoints_total_limit
    state = {"model": run.model, "optimizer": run.optimizer, "ema": run.ema}
    checkpointing.save_checkpoint(run.accelerator, run.output_dir, progress, limit, **state)
    run.checkpoint_due, run.saved_step = False, run.step


def check_weights(run: TrainingRun) -> None:
    """Raise `TrainingDiverged`, on all processes, if a weight is not finite: neither a checkpoint nor a pipeline is written."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in run.network.parameters())
    finite = torch.stack([p.detach().isfinite().all() for p in local]).all().float()
    if not run.accelerator.reduce(finite, "sum") == run.accelerator.num_processes:
        raise TrainingDiverged(f"after step {run.step} weights of the network are not finite")


def how_to_resume(run: TrainingRun) -> str:
    if run.checkpoint_due:
        return "That step was skipped and is not saved. The same command resumes from the checkpoint before it."
    return f"Saved checkpoint-{run.step}. The same command resumes from it."


def validate(run: TrainingRun, callback_on_step_end: Callable | None = None) -> None:
    """Save the snapshots, metrics, sample grids and pushes that are due at this step; the callback may stop generating."""
    config = run.config
    if config.ema_sigma_rel and run.step % (config.ema_snapshot_steps or config.checkpointing_steps) == 0:
        save_snapshot(run.ema, run.output_dir / "snapshots", run.step)
    if run.evaluator is not None and run.evaluator.is_due(run.step, run.total_steps):
        measure(run, callback_on_step_end)
    if run.step % config.validation_steps == 0 and run.step < run.total_steps:
        save_samples(run, f"step-{run.step:07d}", callback_on_step_end)
        push_intermediate(run)


def measure(run: TrainingRun, callback_on_step_end: Callable | None = None) -> None:
    """Compare images of the averaged weights with the training set, on all processes."""
    run.network.eval()
    with run.ema.swapped():
        pipeline = make_pipeline(run.network, run.config)
        results = run.evaluator.measure(pipeline, run.step, run.accelerator.autocast, callback_on_step_end)
    run.network.train()
    if results is not None:
        run.metrics.add(step=run.step, images_seen=run.images_seen, metrics=results)
        run.accelerator.log({f"metrics/{result['name']}": result["value"] for result in results}, step=run.step)


def save_samples(run: TrainingRun, name: str, callback_on_step_end: Callable | None = None) -> None:
    """Generate validation images with the averaged weights on all processes, and save a grid of them."""
    config = run.config
    run.network.eval()
    with run.ema.swapped():
        images = generate_validation_images(
            make_pipeline(run.network, config),
            run.validation_conditions,
            config.num_validation_images,
            config.seed,
            config.train_batch_size,
            run.accelerator,
            callback_on_step_end,
        )
    run.network.train()
    if images is not None:
        grid = save_image_grid(images, run.output_dir / "samples" / f"{name}.png")
        log_grid(run.accelerator, grid, run.step)


def push_intermediate(run: TrainingRun) -> None:
    """Push the averaged weights to the Hub in the background."""
    if run.config.push_to_hub:
        weights = run.ema.full_state_dict()  # by all processes
        if run.pusher is not None:
            save = functools.partial(save_pipeline, run, weights=weights, samples=f"step-{run.step:07d}")
            run.pusher.push(save, f"Step {run.step} of {run.total_steps}")


def save_pipeline(run: TrainingRun, folder: Path, *, weights: dict[str, Tensor], samples: str) -> None:
    """Save a pipeline with what its model card says; `samples` is the name of the grid that these weights generated."""
    network, dataset = network_with_weights(run.network, weights), run.dataset
    pipeline = make_pipeline(network, run.config, dataset.id2label, dataset.condition_columns)
    pipeline.save_pretrained(folder)
    save_metadata(
        folder,
        run.config,
        samples=run.output_dir / "samples" / f"{samples}.png",
        bundled=run.config.dataset_name in BUNDLED_DATASETS,
        images=len(dataset) if dataset.has_length else None,
        steps=run.step,
        images_seen=run.images_seen,
        batch_size=run.global_batch,
        mixed_precision=run.accelerator.mixed_precision,
        runs=run.sessions,
        final_loss=run.loss,
        final_loss_steps=run.loss_steps,
    )


def finish(run: TrainingRun) -> None:
    """Save the samples and the pipeline; with several averages, the pipelines of the others in ema-NAME."""
    save_samples(run, "final")
    others = run.ema.names[1 : len(run.config.ema_decay)]
    for name in (*reversed(others), run.ema.names[0]):
        weights = run.ema.full_state_dict(name)
        if weights is not None:
            folder = run.output_dir / f"ema-{name}" if name in others else run.output_dir
            save_pipeline(run, folder, weights=weights, samples="final")
    run.accelerator.print(f"Saved the pipeline: HDiTPipeline.from_pretrained({run.config.output_dir!r}) loads it.")
    if run.pusher is not None:
        commit = run.pusher.finish(run.config.output_dir, f"End of training, {run.step} steps")
        if commit is not None:
            print(f"Pushed it to {commit.commit_url}")
