"""What `examples/train_hdit.py` is made of: the optimizer, reproducible draws, pipelines, validation images."""

import contextlib
import math
import re
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import diffusion
from ..data.transforms import to_float
from ..evaluation.profiler import profile_network
from ..hub.model_card import TrainingFacts
from ..hub.push import BackgroundPush
from ..models.modeling_hdit import HDiTModel
from ..models.networks import NETWORKS
from ..pipelines.pipeline_hdit import HDiTPipeline
from ..pipelines.pipeline_hdit_upscale import HDiTUpscalePipeline
from ..pipelines.upscaling import downscale, training_conditioning
from ..schedulers.scheduling_edm import DPMSolverPP3MSDEScheduler, EDMHeunScheduler
from ..utils.seeding import mixed_seed
from . import checkpointing as checkpoints
from .augmentation import augment, on


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, mapping_lr_scale: float
) -> list[dict]:
    """
    Groups for AdamW as in the paper: weight decay on the matrices of attention, feed-forward, merges,
    splits, patches and adaptive norms; none on embeddings, Fourier projections, norms and scales. The mapping network
    and the adaptive norms that it feeds learn at `mapping_lr_scale` times the rate.

    A baseline has no mapping network: one rate for all, weight decay on matrices and convolutions.
    """
    has_mapping = isinstance(model, HDiTModel)
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        mapping = has_mapping and (".mapping." in name or re.search(r"\.norm[12]\.linear\.", name) is not None)
        embedding = name.startswith("conditioning.") and not mapping
        # Four axes: convolutions of baselines, but HDiT's additive positions.
        decays = (parameter.ndim == 2 or (parameter.ndim == 4 and not has_mapping)) and not embedding
        groups.setdefault((mapping, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (mapping_lr_scale if mapping else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (mapping, decays), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, args, device: torch.device) -> torch.optim.Optimizer:
    """
    AdamW, in one kernel where PyTorch has it.

    Args:
        args: learning_rate, mapping_lr_scale, adam_weight_decay, adam_beta1, adam_beta2, adam_epsilon, use_8bit_adam.

    Raises:
        ImportError: for 8-bit states without bitsandbytes.
    """
    groups = parameter_groups(model, args.learning_rate, args.adam_weight_decay, args.mapping_lr_scale)
    common = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if not args.use_8bit_adam:
        fused = device.type in ("cuda", "cpu")
        return torch.optim.AdamW(groups, **common, fused=fused, foreach=not fused)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(groups, **common)


def set_schedule(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Brings a learning-rate schedule of `diffusers.optimization` to where `step` optimizer steps leave it."""
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * rule(step) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def resolve_mixed_precision(name: str, device: torch.device) -> str:
    """ "auto" -> "bf16" where the hardware multiplies bfloat16 matrices faster than float32 ones, else "no"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has_products = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile"))
    return "bf16" if device.type == "cpu" and any(has() for has in has_products) else "no"


# ----------------------------------------------------------------------------------------------------------------------
# One step


def image_generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """One for each image, a function of (seed, number of the image in the run): however a batch is divided."""
    return [torch.Generator().manual_seed(mixed_seed("image", seed, number)) for number in numbers]


def draw_noise(
    shape: Sequence[int], seed: int, numbers: Sequence[int], device: torch.device, purpose: str = "noise"
) -> Tensor:
    """Unit-variance noise `(B, C, H, W)`, each image's a function of (seed, number of the image in the run, purpose)."""
    noise, generator = torch.empty(shape, device=device), torch.Generator(device)
    for row, number in zip(noise, numbers, strict=True):
        row.normal_(generator=generator.manual_seed(mixed_seed(purpose, seed, number)))
    return noise


def draw_and_compute_loss(
    model,
    batch: dict,
    device: torch.device,
    *,
    num_classes,
    image_size,
    strata,
    args,
    autocast=contextlib.nullcontext,
    self_conditioning: bool = False,
):
    """
    Everything random of a step but the network's dropout, as functions of (`args.seed`, number of the image in the
    run), then the loss.

    Args:
        batch: "image" `(B, C, H, W)` as the loader gives it, "number" `(B,)`; "label" `(B,)`, "mapping_cond" `(B, D)`.
        image_size: longer side in pixels, for the noise density.
        strata: this process's place in the global batch, arguments of `diffusion.stratified_uniform`.
        args: seed, random_flip, augment_prob, label_dropout, noise_density, noise_density_params, loss_weighting,
            sigma_data; task, and with "upscale" upscale_factor and max_conditioning_noise.
        autocast: makes the context that the network runs in; images and noise are made in float32.
        self_conditioning: of the model. Half of the images are then shown an earlier estimate, drawn for each image and
            not for the batch: so it does not matter how a batch is divided.

    Returns:
        The loss of each image `(B,)` and its sigma `(B,)`, on the device.
    """
    numbers = batch["number"].tolist()
    generators = image_generators(args.seed, numbers)
    u = diffusion.stratified_uniform(len(numbers), **strata, generator=generators)
    flipped, dropped = torch.stack([torch.rand(2, generator=g) for g in generators]).unbind(1)
    flipped, dropped = on(device, flipped < 0.5), on(device, dropped < args.label_dropout)
    sigma = diffusion.sigma_from_uniform(
        u, args.noise_density, image_size=image_size, sigma_data=args.sigma_data, **args.noise_density_params
    )
    sigma = on(device, sigma.float())

    image = to_float(on(device, batch["image"]))
    conditions = {}
    if args.augment_prob:
        image, conditions["augment_cond"] = augment(image, args.augment_prob, generators)
    elif args.random_flip:
        image = torch.where(flipped[:, None, None, None], image.flip(3), image)
    if "label" in batch:
        conditions["class_labels"] = torch.where(dropped, num_classes, on(device, batch["label"]))
    if "mapping_cond" in batch:
        conditions["mapping_cond"] = torch.where(
            dropped[:, None], 0.0, with_presence(on(device, batch["mapping_cond"]))
        )
    if args.task == "upscale":
        level = args.max_conditioning_noise * torch.cat([torch.rand(1, generator=g) for g in generators])
        disturbance = draw_noise(image.shape, args.seed, numbers, device, purpose="conditioning noise")
        conditions["conditioning_image"] = training_conditioning(
            image, args.upscale_factor, on(device, level), disturbance
        )
    shown = None
    if self_conditioning:  # the last draw of the generators: the others are those of a model without
        shown = on(device, torch.cat([torch.rand(1, generator=g) for g in generators]) < 0.5)
    noise = draw_noise(image.shape, args.seed, numbers, device)
    with autocast():
        losses = diffusion.loss(model, image, noise, sigma, args.sigma_data, args.loss_weighting, shown, **conditions)
    return losses, sigma


def seed_dropout(seed: int, number: int) -> None:
    """Makes the network's dropout a function of (seed, number of this process's first image)."""
    torch.manual_seed(mixed_seed("dropout", seed, number))


def clipped_step(accelerator, model: nn.Module, optimizer, loss: Tensor, max_norm: float) -> Tensor:
    """
    One optimizer step with gradients clipped to a norm, or none at all, not even of the optimizer's moments, where the
    loss or the norm is not finite. Where the optimizer is fused, the host does not wait for that to be known.

    Args:
        model, optimizer: as `accelerator.prepare` returned them.
        loss: `()`, the mean over all processes.
        max_norm: of all gradients together, over all processes and shards.

    Returns:
        `(2,)` float32 on the device: the loss, and the norm before clipping.
    """
    bare = checkpoints.bare(optimizer)
    fused = getattr(bare, "_step_supports_amp_scaling", False)
    scaled, engine = accelerator.scaler is not None, accelerator.distributed_type == DistributedType.DEEPSPEED
    if scaled or engine:
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    else:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    norm = torch.as_tensor(norm, dtype=torch.float32, device=accelerator.device)
    norm = torch.where(norm < 0, torch.nan, norm)  # DeepSpeed's ZeRO says -1 where a gradient is not finite
    values = torch.stack((loss.float(), norm))
    if scaled or engine:
        optimizer.step()  # float16's scaler leaves bad steps out itself; DeepSpeed has stepped in its backward pass
    elif fused:
        # What torch.amp.GradScaler hands to fused optimizers (torch/amp/grad_scaler.py): they divide the gradients by
        # grad_scale as they read them, which saves a pass over all of them, and do nothing where found_inf is 1.
        scale = (norm / max_norm).clamp(min=1)
        # Where looking is free: they also write divided gradients back.
        bare.grad_scale = None if scale.device.type == "cpu" and scale == 1 else scale
        bare.found_inf = (~values.isfinite().all()).float()
        optimizer.step()
    elif values.isfinite().all().item():
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        optimizer.step()
    return values


class StopRequest:
    """
    Inside the block SIGTERM and SIGINT ask for a stop after the step at hand; a second SIGINT interrupts at once.

    Attributes:
        name: of the signal that came.
    """

    def __init__(self, accelerator):
        self.name, self.several = None, accelerator.num_processes > 1
        # Agreeing among hosts must not wait for the devices.
        gloo = self.several and torch.distributed.get_backend() != "gloo"
        self.group = torch.distributed.new_group(backend="gloo") if gloo else None

    def __enter__(self) -> "StopRequest":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere, in notebooks, Python allows no handlers
            self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any process was asked: the same answer on all of them."""
        if not self.several:
            return self.name is not None
        asked = torch.tensor([0 if self.name is None else int(signal.Signals[self.name])])
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self.group)
        if asked.item():
            self.name = signal.Signals(asked.item()).name
        return bool(asked.item())


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device, or this process's on other ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------------------------------------------------
# Many devices


def adapt_plugins(accelerator, network: nn.Module, args) -> None:
    """Sets up FSDP2 and DeepSpeed for this network, before `accelerator.prepare`."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        shard_on_cpu(state)
    if state.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
        if args.use_8bit_adam:
            raise ValueError("--use_8bit_adam: the kernels of bitsandbytes do not take the sharded tensors of FSDP2.")
        if plugin.fsdp_version != 2:
            raise ValueError("this trains with FSDP2 only: set fsdp_version to 2 in the configuration of accelerate.")
        # accelerate refuses names of blocks that this network has none of.
        blocks = {type(module).__name__ for module in network.modules()} & set(network._no_split_modules)
        plugin.transformer_cls_names_to_wrap = sorted(blocks)
        # Every process makes the same network. Loading it from one fails on buffers that are saved (accelerate 1.15).
        plugin.cpu_ram_efficient_loading = False
        # Autocast chooses precision as without sharding: the policy would round the noise level to bfloat16.
        plugin.mixed_precision_policy = None
    elif state.distributed_type == DistributedType.DEEPSPEED:
        config = state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_clipping"] = args.max_grad_norm
        config["zero_allow_untested_optimizer"] = True


def skip_bad_steps(accelerator, optimizer) -> None:
    """Under DeepSpeed, after `accelerator.prepare`: its ZeRO optimizers look for bad gradients in float16 and bfloat16."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        checkpoints.bare(optimizer).check_grad_overflow = True


def shard_on_cpu(state) -> None:
    """accelerate shards on accelerators only, though its code works as well on a CPU: for trying things out."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        kind, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        from deepspeed import comm

        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        kind, plugin = DistributedType.DEEPSPEED, DeepSpeedPlugin()
        plugin._set_selected(True)
        plugin.set_mixed_precision(state.mixed_precision)
        state.deepspeed_plugins = {"default": plugin}
    else:
        return
    PartialState().distributed_type = state.distributed_type = kind


def master_weights(accelerator) -> dict:
    """How `ema.Averages` finds the float32 values of weights: DeepSpeed keeps them apart."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return {}
    from deepspeed.utils import safe_get_full_fp32_param

    return {"float32_value": safe_get_full_fp32_param}


def plan(run, checkpoint: Path | None) -> str:
    """What a run is about to do, in lines for people."""
    args, accelerator, network = run.args, run.accelerator, run.network
    height, width = run.dataset.resolution
    profile = profile_network(type(network), dict(network.config), checkpointed_levels=args.checkpointed_levels)
    moments = 2 if args.use_8bit_adam else 8
    averages = 4 * len(run.averages.names)
    shards = accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1
    fixed = profile.parameters * (4 + 4 + moments + averages) / shards
    per_image = profile.activation_bytes * (2 if accelerator.mixed_precision == "no" else 1)
    classes = network.config.num_classes
    conditions = (run.dataset.condition_columns or {"names": []})["names"]
    images = f"{len(run.dataset):,} images" if run.dataset.has_length else "a stream of images"
    split = (
        f"{args.train_batch_size} × {accelerator.num_processes} processes × {args.gradient_accumulation_steps} parts"
    )
    start = f"from {checkpoint}: step {run.step}" if checkpoint else "from the beginning"
    lines = [
        f"network     {NETWORKS[args.model_type].__name__}: "
        f"{profile.parameters / 1e6:.1f}M parameters, {profile.macs / 1e9:.1f} GMAC an image",
        f"data        {images} at {height}×{width}"
        + (f", {classes} classes" if classes else "")
        + (f", conditions {', '.join(conditions)}" if conditions else ""),
        f"training    {run.total_steps:,} steps of {run.global_batch} images ({split})"
        + (f", {run.total_steps * run.global_batch / len(run.dataset):.1f} epochs" if run.dataset.has_length else ""),
        f"start       {start}",
        f"precision   {accelerator.mixed_precision}; {accelerator.distributed_type.value.lower()} on "
        f"{describe_hardware(accelerator)}",
        f"memory      about {(fixed + per_image * args.train_batch_size) / 2**30:.2f} GiB a device: "
        f"{fixed / 2**30:.2f} for weights, gradients, optimizer and averages, {per_image / 2**20:.0f} MiB an image",
        f"output      {args.output_dir}",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines


SCHEDULERS = {
    cls.__name__: cls
    for cls in (EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EDMHeunScheduler, DPMSolverPP3MSDEScheduler)
}


def make_scheduler(config: dict) -> SchedulerMixin:
    """
    Args:
        config: arguments of a scheduler, and its name in "_class_name"; EDMDPMSolverMultistepScheduler by default.

    Raises:
        ValueError: for an unknown scheduler, or arguments that it does not take or can't sample with.
    """
    config = dict(config)
    name = config.pop("_class_name", "EDMDPMSolverMultistepScheduler")
    if name not in SCHEDULERS:
        raise ValueError(f'the config\'s "scheduler" is wrong: _class_name must be one of {", ".join(SCHEDULERS)}.')
    try:
        scheduler = SCHEDULERS[name](**config)
    except (TypeError, NotImplementedError, ValueError) as error:
        raise ValueError(f'the config\'s "scheduler" is wrong: {error}') from error
    if scheduler.config.get("algorithm_type") == "sde-dpmsolver++" and scheduler.config.solver_order > 2:
        raise ValueError(
            'the config\'s "scheduler" is wrong: sde-dpmsolver++ has solver_order 1 or 2 in Diffusers. '
            "DPMSolverPP3MSDEScheduler is the third-order one."
        )
    return scheduler


def averaged_network(trained: ModelMixin, weights: dict[str, Tensor]) -> ModelMixin:
    """A network like the trained one with these weights, which it takes over; in evaluation mode, in main memory."""
    with torch.device("meta"):
        network = type(trained).from_config(trained.config)
    network.load_state_dict(weights, assign=True)
    for name, buffer in trained.named_buffers():
        if name not in weights:  # fixed tables, which are not saved
            place, _, leaf = name.rpartition(".")
            network.get_submodule(place).register_buffer(leaf, buffer.to("cpu", copy=True), persistent=False)
    return network.eval()


def make_pipeline(model, args, id2label=None, condition_columns=None) -> HDiTPipeline:
    """
    Args:
        args: scheduler, task, and with the task "upscale" upscale_factor and max_conditioning_noise.
    """
    parts = {"id2label": id2label, "condition_columns": condition_columns}
    if args.task == "upscale":
        parts |= {"upscale_factor": args.upscale_factor, "max_noise_level": args.max_conditioning_noise}
    pipeline_class = HDiTUpscalePipeline if args.task == "upscale" else HDiTPipeline
    return pipeline_class(model, make_scheduler(args.scheduler), **parts)


SAMPLE_STEPS = 50


def draw_validation_images(
    pipeline: HDiTPipeline, conditions: dict[str, Tensor], num_images: int, seed: int, batch_size: int, accelerator
) -> Tensor | None:
    """
    The same noise and conditions each time, so that pictures of different steps can be compared: image i depends on
    (seed, i) and the weights, whatever the batch size or the number of processes. All processes draw their share.

    Args:
        conditions: `num_images` of each argument of the pipeline, from `validation_conditions`.

    Returns:
        `(num_images, C, H, W)` in [0, 1] on the main process's host, None on the others.
    """
    pipeline.set_progress_bar_config(disable=True)
    world = accelerator.num_processes
    # Everybody draws equally many, the last ones twice if need be: sharded weights are gathered for all at once.
    mine = [i % num_images for i in range(accelerator.process_index, -(-num_images // world) * world, world)]
    drawn = []
    for start in range(0, len(mine), batch_size):
        part = mine[start : start + batch_size]
        # Autocast as in training: sharded networks do not bring it with them.
        with accelerator.autocast():
            images = pipeline(
                **{name: values[part] for name, values in conditions.items()},
                num_images_per_prompt=1 if conditions else len(part),
                num_inference_steps=SAMPLE_STEPS,
                generator=[torch.Generator().manual_seed(mixed_seed("validation", seed, i)) for i in part],
                output_type="pt",
            ).images
        drawn.append(images)
    images = accelerator.gather(torch.cat(drawn).contiguous())
    if not accelerator.is_main_process:
        return None
    return images.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:num_images].cpu()


def validation_conditions(dataset, num_images: int, args) -> dict[str, Tensor]:
    """
    What the pictures on the way are drawn from: the classes in turn; the numbers that come with the first images (of a
    stream: the mean of everything); and, for super-resolution, the first images made small.

    Args:
        args: task, upscale_factor.

    Raises:
        ValueError: for super-resolution of a stream, whose first images are not at hand.
    """
    conditions, places = {}, []
    if dataset.has_length:  # with buckets, those that have the size of the first one
        alike = [i for i in range(min(len(dataset), 64 * num_images)) if dataset.size_of(i) == dataset.size_of(0)]
        places = [alike[i % len(alike)] for i in range(num_images)]
    if dataset.id2label:
        conditions["class_labels"] = torch.arange(num_images) % len(dataset.id2label)
    if dataset.condition_columns is not None:
        values = torch.zeros(num_images, len(dataset.condition_columns["names"]))
        for i, place in enumerate(places):
            values[i] = torch.as_tensor(dataset.conditions[place])
        conditions["mapping_cond"] = with_presence(values)
    if args.task == "upscale":
        if not dataset.has_length:
            raise ValueError(
                "--task upscale draws its pictures from the first images, which --streaming does not keep."
            )
        middle = (0.5, 0.5)
        images = torch.stack([to_float(dataset[place, middle]["image"]) for place in places])
        conditions["image"] = downscale(images, args.upscale_factor) / 2 + 0.5
        if dataset.labels is not None:
            conditions["class_labels"] = torch.tensor([int(dataset.labels[place]) for place in places])
    return conditions


def with_presence(conditions: Tensor) -> Tensor:
    """`(B, D) -> (B, D + 1)`: a last entry of 1 says that there is a condition; all zeros would be every column's mean."""
    return torch.nn.functional.pad(conditions, (0, 1), value=1.0)


def save_image_grid(images: Tensor, path: Path) -> Image.Image:
    """
    Writes (and returns) images `(B, C, H, W)` in [0, 1] as a picture with as many columns as rows, or more. Channels that are no
    colours (2, or more than 4) are shown side by side, grey.
    """
    if images.shape[1] not in (1, 3, 4):
        images = images.transpose(1, 2).flatten(2)[:, None]
    pictures = VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).float().numpy())
    rows = next(n for n in range(math.isqrt(len(images)), 0, -1) if len(images) % n == 0)
    path.parent.mkdir(exist_ok=True)
    grid = make_image_grid(pictures, rows=rows, cols=len(images) // rows)
    grid.save(path)
    return grid


def log_picture(accelerator, picture: Image.Image, step: int) -> None:
    """To every tracker; on the main process."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(picture.convert("RGB"))
            tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [picture]}, step=step)
        elif tracker.name == "trackio":  # accelerate 1.15 has no log_images for it
            import trackio

            tracker.log({"samples": trackio.Image(picture)}, step=step)


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
        ema_decay=args.ema_decay[0],
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
