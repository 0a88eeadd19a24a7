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

from .neighborhood_operators import make_operators


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


def _ready(*tensors: Tensor) -> list[Tensor]:
    """Float32, channels next to each other and as many as the kernels take."""
    missing = -tensors[0].shape[-1] % _CHANNELS
    tensors = [F.pad(x.float(), (0, missing)) if missing else x.float() for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _call(function: str, tensors: tuple, strided: tuple, cos: Tensor | None, kh: int, kw: int, scale: float) -> None:
    sizes = [*tensors[0].shape, kh, kw, 0 if cos is None else cos.shape[-1]]
    strides = [stride for x in strided for stride in x.stride()[:4]]
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    call = getattr(library(), function)
    call.restype = None
    arrays = ((ctypes.c_int64 * len(numbers))(*numbers) for numbers in (sizes, strides))
    call(*pointers, *arrays, ctypes.c_float(scale))


def _forward(query, key, value, norm, cos, sin, kh, kw, scale) -> tuple[Tensor, Tensor]:
    b, h, w, n, d = query.shape
    q, k, v = _ready(query, key, value)
    out, lse = q.new_empty(q.shape), q.new_empty((b, n, h, w))
    _call("forward", (q, k, v, norm, cos, sin, out, lse), (q, k, v, out), cos, kh, kw, scale)
    return out[..., :d].to(query.dtype).contiguous(), lse


def _backward(gradient, query, key, value, norm, cos, sin, out, lse, kh, kw, scale) -> tuple[Tensor, ...]:
    b, h, _, n, d = query.shape
    q, k, v, o, g = _ready(query, key, value, out, gradient)
    o = o.contiguous()
    gradients = q.new_empty(q.shape), q.new_zeros(q.shape), q.new_zeros(q.shape)
    shares = q.new_empty(0 if norm is None else (2, b, n, h))
    tensors = (q, k, v, norm, cos, sin, o, g, lse, *gradients, shares)
    _call("backward", tensors, (q, k, v, o, g), cos, kh, kw, scale)
    of_norm = shares if norm is None else shares.sum((0, 1, 3))
    return *(x[..., :d].to(query.dtype).contiguous() for x in gradients), of_norm


attend, attend_backward = make_operators("cpp", _forward, _backward, device_types="cpu")
