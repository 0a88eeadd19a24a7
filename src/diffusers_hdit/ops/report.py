"""What would run on a device, and why: `print(diffusers_hdit.ops.report(model, "cuda"))`."""

from dataclasses import dataclass

import torch
from torch import nn

from .linear import onednn_is_faster
from .neighborhood_attention import auto_backends, unavailable_reason
from .registry import kernels_enabled, kernels_of


@dataclass
class OperationReport:
    """One operation: the kernel that would run, and for each that was passed over the reason in words."""

    operation: str
    kernel: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.operation:<44}{self.kernel}{f' ({reasons})' if reasons else ''}"


@dataclass
class KernelReport:
    """What would run for a model on a device; `str()` is a table of lines."""

    device: str
    dtype: torch.dtype
    rows: list[OperationReport]

    def __str__(self) -> str:
        title = f"kernels on {self.device} in {str(self.dtype).removeprefix('torch.')}"
        if not kernels_enabled():
            title += " (switched off: DIFFUSERS_HDIT_KERNELS=0 or set_kernels_enabled(False))"
        return "\n".join((title, *(f"  {row}" for row in self.rows)))


def report(
    model: nn.Module,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    training: bool = False,
) -> KernelReport:
    """
    Say which kernels would run for a model, and why others would not. Nothing is run; C++ kernels are compiled to know.

    Args:
        model: an `HDiTModel`, on any device, the meta device included; baselines have PyTorch's operations only.
        device, dtype: to report for; by default the model's, or the CPU for a model on the meta device.
        training: whether gradients are needed, which some backends do not have.
    """
    own = next(model.parameters())
    device_type = torch.device(device or ("cpu" if own.device.type == "meta" else own.device)).type
    dtype = dtype or own.dtype
    rows = [
        attention_report(i, level, device_type, dtype, training)
        for i, level in enumerate(getattr(model, "levels", ()))
    ]
    if rows:
        rows += [operation_report(name, device_type, dtype) for name in ("rms_norm", "geglu", "normalize_and_rotate")]
        onednn = kernels_enabled() and device_type == "cpu" and dtype == torch.float32 and onednn_is_faster()
        rows.append(OperationReport("linear", "oneDNN (MKL leaves AVX-512 unused here)" if onednn else "PyTorch", {}))
    return KernelReport(device_type, dtype, [row for row in rows if row is not None])


def attention_report(
    index: int, level, device_type: str, dtype: torch.dtype, training: bool
) -> OperationReport | None:
    """Describe the attention of a level."""
    if level.type == "none":
        return None
    name = f"level {index}: {level.type} attention, {level.heads} heads of {level.head_dim}"
    if level.type != "neighborhood":
        return OperationReport(name, "PyTorch's scaled dot product attention", {})
    name = f"level {index}: {level.kernel_size}×{level.kernel_size} neighborhoods, {level.heads} heads of {level.head_dim}"
    passed_over = {}
    for backend in auto_backends(device_type):
        reason = unavailable_reason(
            backend,
            device=device_type,
            dtype=dtype,
            head_dim=level.head_dim,
            training=training,
            kernel_size=(level.kernel_size, level.kernel_size),
        )
        if reason is None:
            break
        passed_over[backend] = reason.partition("cannot run here: ")[2].partition(". Use")[0] or reason
    return OperationReport(name, backend, passed_over)


def operation_report(name: str, device_type: str, dtype: torch.dtype) -> OperationReport:
    """Describe an operation that has the same shape in all levels."""
    passed_over = {}
    for kernel in kernels_of(name).values():
        problem = kernel.problem(device_type, dtype) if kernels_enabled() else "kernels are switched off"
        if problem is None:
            return OperationReport(name, f"{kernel.name} (in graphs of torch.compile: PyTorch)", passed_over)
        passed_over[kernel.name] = problem
    return OperationReport(name, "PyTorch", passed_over)
