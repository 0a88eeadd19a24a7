"""The kernels that are installed with the package; see `registry.py` for how to add one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kernel:
    """
    One way to run an operation.

    Args:
        name: what reports and `set_neighborhood_backend` call it.
        run: takes the operation's arguments.
        accepts: whether it can run on these arguments; asked at each call, so it must be quick.
        problem: why it can't run for `(device_type, dtype)`, in words, or None; for neighborhood attention
            `(device_type, dtype, head_dim)`.
    """

    name: str
    run: Callable
    accepts: Callable[..., bool]
    problem: Callable[..., str | None]


# The kernels of each operation by name; the first that accepts the arguments runs.
KERNELS: dict[str, dict[str, Kernel]] = {}


def register_kernel(operation: str, kernel: Kernel) -> None:
    """Make a kernel known, to be asked before those that are there; one of the same name is replaced."""
    others = {name: other for name, other in KERNELS.get(operation, {}).items() if name != kernel.name}
    KERNELS[operation] = {kernel.name: kernel, **others}


# ----------------------------------------------------------------------------------------------------------------------
# C++ for CPUs, compiled when it is first used

_library_problem: str | None = None


@torch.compiler.assume_constant_result
def library_problem() -> str:
    """Return why the C++ kernels can't be used, empty if they can; they are compiled and registered now at the latest."""
    global _library_problem
    if _library_problem is None:
        try:
            from .cpu import fused, library, neighborhood_attention  # noqa: F401  (registers operators)

            library.library()
            _library_problem = ""
        except (OSError, RuntimeError) as error:
            _library_problem = str(error)
    return _library_problem


def cpp_problem(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"its kernels run on the CPU, not on {device_type!r}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"its kernels are for float32 and bfloat16, not for {dtype}"
    return library_problem() or None


def cpp_accepts(x: torch.Tensor) -> bool:
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not library_problem()
    )


def cpp_accepts_norm(x: torch.Tensor, scale: torch.Tensor) -> bool:
    return scale.device == x.device and x.dtype in (scale.dtype, torch.float32) and cpp_accepts(x)


def cpp_accepts_rotation(x: torch.Tensor, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    same_device = norm.device == x.device == cos.device
    return same_device and cos.dtype == torch.float32 and not cos.requires_grad and cpp_accepts(x)


def run_cpp(name: str) -> Callable:
    """Return a function that is imported, and the library compiled, at its first call."""

    def run(*args):
        from .cpu import fused

        return getattr(fused, name)(*args)

    return run


for _operation, _accepts in (
    ("geglu", cpp_accepts),
    ("rms_norm", cpp_accepts_norm),
    ("normalize_and_rotate", cpp_accepts_rotation),
):
    register_kernel(_operation, Kernel("cpp", run_cpp(_operation), _accepts, cpp_problem))


# ----------------------------------------------------------------------------------------------------------------------
# Neighborhood attention

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_triton: tuple[str, bool] | None = None


@torch.compiler.assume_constant_result
def triton_kernels() -> tuple[str, bool]:
    """Return why the Triton kernels can't be imported, empty if they can, and whether Triton interprets them."""
    global _triton
    if _triton is None:
        import importlib.util

        if importlib.util.find_spec("triton") is None:
            _triton = "Triton is not installed", False
        else:
            try:
                from .triton import neighborhood_attention

                _triton = "", neighborhood_attention.INTERPRETED
            except ImportError as error:  # a broken Triton
                _triton = f"its kernels do not import ({error})", False
    return _triton


def triton_problem(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"its kernels run on CUDA, not on {device_type!r}"
    if dtype not in _DTYPES:
        return f"its kernels compute in float32, float16 or bfloat16, not in {dtype}"
    if head_dim not in (16, 32, 64, 128):
        return f"its kernels are for heads of 16, 32, 64 or 128 channels, not {head_dim}"
    problem, interpreted = triton_kernels()
    if device_type == "cpu" and not (problem or interpreted):
        return "its kernels run on CUDA, not on 'cpu' (but for tests, in Triton's interpreter: TRITON_INTERPRET=1)"
    return problem or None


def cpp_attention_problem(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device_type != "cpu":
        return f"its kernels run on the CPU, not on {device_type!r}"
    if dtype not in _DTYPES:
        return f"its kernels are for float32, float16 and bfloat16, not for {dtype}"
    return library_problem() or None


def attention_operator(name: str) -> Callable:
    """
    Return a function that calls the operator `name`, which its module registers.

    It looks the operator up by name: a traced graph must not import, and the module was imported to ask for problems.
    """

    def run(query, key, value, kernel_size, scale, norm=None, cos=None, sin=None):
        operator = getattr(torch.ops.diffusers_hdit, f"{name}_neighborhood_attention")
        return operator(query, key, value, norm, cos, sin, *kernel_size, scale)[0]

    return run


register_kernel(
    "neighborhood_attention", Kernel("cpp", attention_operator("cpp"), lambda *args: True, cpp_attention_problem)
)
register_kernel(
    "neighborhood_attention", Kernel("triton", attention_operator("triton"), lambda *args: True, triton_problem)
)
