"""Neighborhood attention on the CPU in C++ (`neighborhood_cpp.cpp`), compiled when it is first used.

The library is kept in `TORCH_EXTENSIONS_DIR`, else in `~/.cache/diffusers_hdit/kernels` (`XDG_CACHE_HOME`), under a name
that says what it was made of: source, flags, compiler, PyTorch and processor. It computes in float32; float16 and bfloat16
are converted. Threads are PyTorch's own.

Shapes: as in `neighborhood.py`.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


SOURCE = Path(__file__).with_suffix(".cpp")
_CHANNELS = 16  # of whose multiples the kernels take heads
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp")


# ---- The library ----


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def compiled() -> Path:
    """
    The library, compiled unless it is there.

    Raises:
        RuntimeError: without Linux or a compiler; with what the compiler said, if it failed.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"its kernels are compiled on Linux only, not on {sys.platform!r}")
    compiler, flags = shutil.which(_compiler()), [*_FLAGS, *_paths()]
    if compiler is None:
        raise RuntimeError(f"its kernels need a C++ compiler, and {_compiler()!r} is missing; CXX names another")
    facts = (SOURCE.read_bytes(), repr(flags), compiler, os.path.getmtime(compiler), torch.__version__, _processor())
    name = f"neighborhood-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    reasons = []
    for folder in _folders():
        try:
            return _compile(compiler, flags, folder, name)
        except OSError as error:  # a home that cannot be written to
            reasons.append(str(error))
    raise RuntimeError(f"its kernels have no place: {'; '.join(reasons)}. Set TORCH_EXTENSIONS_DIR")


def _compile(compiler: str, flags: list[str], folder: Path, name: str) -> Path:
    # The library that is found in it is run: nobody else may write there, and no link of somebody's may lead elsewhere.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is a link, or others than this user may write to it")
    if (folder / name).is_file():
        return folder / name
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, str(SOURCE), "-o", unfinished, *flags], capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or [
                f"it ended with {done.returncode}"
            ]
            raise RuntimeError(f"its kernels do not compile: {compiler} says {' '.join(said[:2])}")
        os.replace(unfinished, folder / name)  # whole or not at all: other processes compile too
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return folder / name


def _paths() -> list[str]:
    """What the compiler needs of PyTorch; its OpenMP before the system's, or two of them would keep threads busy."""
    package = Path(torch.__file__).parent
    openmp = sorted(map(str, (package / "lib").glob("libgomp*.so*")))[:1]
    libraries = ["-Wl,--as-needed", f"-L{package / 'lib'}", *openmp, "-ltorch_cpu", "-lc10"]
    return [f"-I{package / 'include'}", *libraries]


def _folders() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = [Path(own).absolute() if own else Path(cache, "diffusers_hdit", "kernels")]
    folders.append(Path(tempfile.gettempdir()) / f"diffusers_hdit-{os.getuid()}")
    return [folder for folder in folders if folder.is_absolute()]  # a user without a home has "~"


def _processor() -> str:
    """Homes are shared by machines with different processors; "native" code is not."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine()


_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    """The kernels; raises RuntimeError and OSError where there can be none."""
    global _library
    if _library is None:
        _library = ctypes.CDLL(str(compiled()))
    return _library


# ---- The operators ----


def _prepare(*tensors: Tensor) -> list[Tensor]:
    """Float32, channels next to each other and as many as the kernels take."""
    missing = -tensors[0].shape[-1] % _CHANNELS
    tensors = [F.pad(x.float(), (0, missing)) if missing else x.float() for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _call(function: str, tensors: tuple, strided: tuple, kh: int, kw: int, scale: float) -> None:
    b, h, w, n, d = tensors[0].shape
    sizes = (ctypes.c_int64 * 7)(b, h, w, n, d, kh, kw)
    strides = [stride for x in strided for stride in x.stride()[:4]]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    call = getattr(library(), function)
    call.restype = None
    call(*pointers, sizes, (ctypes.c_int64 * len(strides))(*strides), ctypes.c_float(scale))


# One name for the whole process: unlike `neighborhood.py`, this file is not carried along with saved models.
@torch.library.custom_op("diffusers_hdit::cpp_neighborhood_attention", mutates_args=(), device_types="cpu")
def attend(query: Tensor, key: Tensor, value: Tensor, kh: int, kw: int, scale: float) -> tuple[Tensor, Tensor]:
    """
    Args:
        query, key, value: `(B, h, w, n, d)` on the CPU, any strides, float32, float16 or bfloat16.
        kh, kw: window in tokens, odd, at most h and w.
        scale: factor on the scores.

    Returns:
        `(B, h, w, n, d)`, and log2 of the softmax's denominators `(B, n, h, w)` in float32, which has no gradient.
    """
    b, h, w, n, d = query.shape
    q, k, v = _prepare(query, key, value)
    out, lse = q.new_empty(q.shape), q.new_empty((b, n, h, w))
    _call("forward", (q, k, v, out, lse), (q, k, v, out), kh, kw, scale)
    return out[..., :d].to(query.dtype).contiguous(), lse


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, kh: int, kw: int, scale: float) -> tuple[Tensor, Tensor]:
    b, h, w, n, d = query.shape
    return query.new_empty(query.shape), query.new_empty((b, n, h, w), dtype=torch.float32)


@torch.library.custom_op("diffusers_hdit::cpp_neighborhood_attention_backward", mutates_args=(), device_types="cpu")
def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kh: int,
    kw: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of `out`; it has no gradient of its own."""
    d = query.shape[-1]
    q, k, v, o, g = _prepare(query, key, value, out, gradient)
    o = o.contiguous()
    gradients = q.new_empty(q.shape), q.new_zeros(q.shape), q.new_zeros(q.shape)
    _call("backward", (q, k, v, o, g, lse, *gradients), (q, k, v, o, g), kh, kw, scale)
    return tuple(x[..., :d].to(query.dtype).contiguous() for x in gradients)


@attend_backward.register_fake
def _(gradient, query, key, value, out, lse, kh, kw, scale) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _gradients(ctx, gradient: Tensor, _: Tensor) -> tuple:
    return *attend_backward(gradient, *ctx.saved_tensors, *ctx.options), None, None, None


attend.register_autograd(_gradients, setup_context=_keep)
