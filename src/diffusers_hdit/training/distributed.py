"""One GPU or many: the accelerator, what FSDP2 and DeepSpeed need, and signals that stop all processes."""

import math
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, is_tensorboard_available, parse_flag_from_env
from torch import nn

from ..utils.memory import keep_freed_memory
from .checkpointing import unwrap_optimizer
from .config import TrainingConfig
from .optimization import resolve_mixed_precision


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """
    Return the accelerator of a run.

    Raises:
        ValueError: where accelerate was configured with another number of accumulation steps.
        ImportError: for trackers that are not installed.
    """
    # Explicit: several processes on a CPU would not find each other otherwise.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Checking many images for the first time can take long, and the other processes wait for it.
    device = PartialState(cpu=cpu, timeout=timedelta(hours=4)).device
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        # `accelerate launch` gives one thread to a process unless told otherwise: share the cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if device.type == "cpu":
        keep_freed_memory()
    if config.allow_tf32 and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    reports = config.report_to or ("tensorboard" if is_tensorboard_available() else "none")
    trackers = [] if reports == "none" else reports.split(",")
    logging_dir = str(Path(config.output_dir, config.logging_dir))
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=resolve_mixed_precision(config.mixed_precision, device),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=trackers or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=logging_dir),
    )
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"accelerate was configured with {accelerator.gradient_accumulation_steps} gradient accumulation steps, this "
            f"training with {config.gradient_accumulation_steps}: leave them out of the configuration of accelerate."
        )
    if missing := set(trackers) - {str(getattr(name, "value", name)) for name in accelerator.log_with}:
        raise ImportError(f"--report_to {config.report_to}: {', '.join(sorted(missing))} is not installed.")
    return accelerator


def describe_hardware(accelerator: Accelerator) -> str:
    """Return the hardware of all processes in words, for instance "8 × NVIDIA H100"."""
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    return name if accelerator.num_processes == 1 else f"{accelerator.num_processes} × {name}"


def adapt_plugins(accelerator: Accelerator, network: nn.Module, config: TrainingConfig) -> None:
    """Set up FSDP2 and DeepSpeed for this network, before `accelerator.prepare`."""
    state = accelerator.state
    if state.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
        if config.use_8bit_adam:
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
        state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.train_batch_size,
            "gradient_clipping": config.max_grad_norm,
            "zero_allow_untested_optimizer": True,
        }


def skip_bad_steps(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Have DeepSpeed's ZeRO optimizers look for gradients that are not finite; after `accelerator.prepare`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unwrap_optimizer(optimizer).check_grad_overflow = True


def master_weights(accelerator: Accelerator) -> dict:
    """Return the argument by which `EMAWeights` finds the float32 values of weights: DeepSpeed keeps them apart."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return {}
    from deepspeed.utils import safe_get_full_fp32_param

    return {"float32_value": safe_get_full_fp32_param}


# A Ctrl-C arrives twice under `accelerate launch`: from the terminal, and from the launcher.
SAME_SIGNAL_SECONDS = 2.0


class Stopped(Exception):
    """The run was asked to stop while images were generated."""


class StopRequest:
    """
    A context in which SIGTERM and SIGINT ask for a stop after the current step; another SIGINT more than two seconds later
    interrupts at once.

    Attributes:
        name: the name of the signal that arrived, or None.
    """

    def __init__(self, accelerator):
        self.name, self.several, self.arrived = None, accelerator.num_processes > 1, -math.inf
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
            # The second one of a Ctrl-C may still be on its way while a stopped run ends.
            if self.name is None or number != signal.SIGINT:
                signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        again = self.name is not None and time.monotonic() - self.arrived > SAME_SIGNAL_SECONDS
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name, self.arrived = signal.Signals(number).name, time.monotonic()

    def raise_if_agreed(self, *_) -> dict:
        """Raise `Stopped` on all processes if any was asked to stop; a callback of pipelines after each inference step."""
        if self.agreed():
            raise Stopped
        return {}

    def agreed(self) -> bool:
        """Return whether any process was asked to stop: the same answer on all of them."""
        if not self.several:
            return self.name is not None
        asked = torch.tensor([0 if self.name is None else int(signal.Signals[self.name])])
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self.group)
        if asked.item():
            self.name = signal.Signals(asked.item()).name
        return bool(asked.item())
