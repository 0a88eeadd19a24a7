"""What a run is about to do, in lines for people, and the memory that it takes."""

import resource
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType

from .. import ops
from ..evaluation.profiler import profile_network
from ..models.networks import NETWORKS
from .distributed import describe_hardware


def run_summary(run, checkpoint: Path | None) -> str:
    """
    Describe the network, data, length, start, precision, memory and kernels of a `TrainingRun`.

    Args:
        checkpoint: where the run starts from, None for the beginning.
    """
    config, accelerator, network, dataset = run.config, run.accelerator, run.network, run.dataset
    height, width = dataset.resolution
    profile = profile_network(type(network), dict(network.config), checkpointed_levels=config.checkpointed_levels)
    moments = 2 if config.use_8bit_adam else 8
    averages = 4 * len(run.ema.names)
    shards = accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1
    fixed = profile.parameters * (4 + 4 + moments + averages) / shards
    per_image = profile.activation_bytes * (2 if accelerator.mixed_precision == "no" else 1)
    total = fixed + per_image * config.train_batch_size

    images = f"{len(dataset):,} images" if dataset.has_length else "a stream of images"
    classes = f", {dataset.class_summary()}" if dataset.id2label else ""
    columns = (dataset.condition_columns or {"names": []})["names"]
    conditions = f", conditions {', '.join(columns)}" if columns else ""
    batch = (
        f"{config.train_batch_size} × {accelerator.num_processes} processes × {config.gradient_accumulation_steps} "
        "accumulation steps"
    )
    images_seen = run.total_steps * run.global_batch
    epochs = f", {images_seen / len(dataset):.1f} epochs" if dataset.has_length else ""
    start = f"from {checkpoint}: step {run.step}" if checkpoint else "from the beginning"
    precision = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
    lines = {
        "network": f"{NETWORKS[config.model_type].__name__}: {profile.parameters / 1e6:.1f}M parameters, "
        f"{with_unit(profile.macs, ('', 'k', 'M', 'G', 'T'), 1000)}MAC per image",
        "data": f"{images} at {height}×{width}{classes}{conditions}",
        "training": f"{run.total_steps:,} steps of {run.global_batch} images ({batch}){epochs}",
        "start": start,
        "precision": f"{precision.get(accelerator.mixed_precision, accelerator.mixed_precision)}; "
        f"{'one process' if accelerator.num_processes == 1 else accelerator.distributed_type.value.lower()} on "
        f"{describe_hardware(accelerator)}",
        "memory": f"about {as_bytes(total)} per device for tensors, besides what Python and PyTorch take: "
        f"{as_bytes(fixed)} for weights, gradients, optimizer and averages, {as_bytes(per_image)} per image",
        "output": config.output_dir,
    }
    if config.lr_scheduler != "constant" and config.lr_warmup_steps > run.total_steps:
        lines["note"] = (
            f"--lr_warmup_steps {config.lr_warmup_steps} is longer than the run: its learning rate is never reached"
        )
    computes_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    kernels = ops.report(network, accelerator.device, computes_in, training=True)
    return "\n".join((*(f"{name:<12}{line}" for name, line in lines.items()), str(kernels)))


def with_unit(value: float, units: tuple[str, ...], base: int) -> str:
    """Return a number with four digits and a unit, such as "31.42 G"."""
    for unit in units[:-1]:
        if value < base:
            return f"{value:.4g} {unit}"
        value /= base
    return f"{value:.4g} {units[-1]}"


def as_bytes(count: float) -> str:
    return with_unit(count, ("B", "KiB", "MiB", "GiB"), 1024)


def memory_in_use(device: torch.device) -> int:
    """Return the bytes that were allocated on a CUDA device at most, or by this process for other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
