"""Optimizer, learning-rate schedule and one optimizer step."""

import re

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.modeling_hdit import HDiTModel
from .checkpointing import unwrap_optimizer
from .config import TrainingConfig


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, mapping_lr_scale: float
) -> list[dict]:
    """
    Return the paper's parameter groups for AdamW.

    Weight decay is on the matrices of attention, feed-forward, merges, splits, patches and adaptive norms; not on
    embeddings, Fourier projections, norms and scales. The mapping network and the adaptive norms learn at
    `mapping_lr_scale` times the learning rate. A baseline has no mapping network: one learning rate for all, and weight
    decay on matrices and convolutions.
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


def make_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """
    Return an AdamW optimizer, fused into one kernel where PyTorch has it.

    Raises:
        ImportError: for 8-bit states without bitsandbytes.
    """
    groups = parameter_groups(model, config.learning_rate, config.adam_weight_decay, config.mapping_lr_scale)
    common = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if not config.use_8bit_adam:
        fused = device.type in ("cuda", "cpu")
        return torch.optim.AdamW(groups, **common, fused=fused, foreach=not fused)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(groups, **common)


def set_schedule(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Set a learning-rate schedule of `diffusers.optimization` to its state after `step` optimizer steps."""
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * rule(step) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def resolve_mixed_precision(name: str, device: torch.device) -> str:
    """Resolve "auto": "bf16" where the hardware multiplies bfloat16 matrices faster than float32 ones, else "no"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has_products = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile"))
    return "bf16" if device.type == "cpu" and any(has() for has in has_products) else "no"


def clipped_step(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float
) -> Tensor:
    """
    Clip the gradients to a norm and take an optimizer step, unless the loss or the norm is not finite.

    A skipped step changes neither weights nor the optimizer's moments. With a fused optimizer the host does not wait for
    the device to know.

    Args:
        model, optimizer: as `accelerator.prepare` returned them.
        loss: `()`, the mean over all processes.
        max_norm: of all gradients together, over all processes and shards.

    Returns:
        `(2,)` float32 on the device: the loss, and the norm before clipping.
    """
    inner = unwrap_optimizer(optimizer)
    fused = getattr(inner, "_step_supports_amp_scaling", False)
    scaled, engine = accelerator.scaler is not None, accelerator.distributed_type == DistributedType.DEEPSPEED
    if scaled or engine:
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    else:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    norm = torch.as_tensor(norm, dtype=torch.float32, device=accelerator.device)
    norm = torch.where(norm < 0, torch.nan, norm)  # DeepSpeed's ZeRO reports -1 where a gradient is not finite
    values = torch.stack((loss.float(), norm))
    if scaled or engine:
        optimizer.step()  # float16's scaler skips bad steps itself; DeepSpeed has stepped in its backward pass
    elif fused:
        # What torch.amp.GradScaler hands to fused optimizers (torch/amp/grad_scaler.py): they divide the gradients by
        # grad_scale as they read them, which saves a pass over all of them, and do nothing where found_inf is 1.
        scale = (norm / max_norm).clamp(min=1)
        # Where looking is free: they also write divided gradients back.
        inner.grad_scale = None if scale.device.type == "cpu" and scale == 1 else scale
        inner.found_inf = (~values.isfinite().all()).float()
        optimizer.step()
    elif values.isfinite().all().item():
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        optimizer.step()
    return values
