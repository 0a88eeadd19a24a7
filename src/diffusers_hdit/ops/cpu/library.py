"""The library of C++ kernels for CPUs (`*.cpp` of this folder), compiled when one is first used.

It is kept in `TORCH_EXTENSIONS_DIR`, else in `~/.cache/diffusers_hdit/kernels` (`XDG_CACHE_HOME`), under a name that
depends on its sources, flags, compiler, PyTorch and processor. Threads are PyTorch's own.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor


try:
    import fcntl
except ImportError:  # Windows, where nothing is compiled
    fcntl = None

logger = logging.getLogger(__name__)


_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp")


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def library_path() -> Path:
    """
    Return the path of the library, which is compiled unless it is there.

    Raises:
        RuntimeError: without Linux or a compiler; with what the compiler said, if it failed.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"its kernels are compiled on Linux only, not on {sys.platform!r}")
    compiler, flags = shutil.which(_compiler()), [*_FLAGS, *_paths()]
    if compiler is None:
        raise RuntimeError(f"its kernels need a C++ compiler, and {_compiler()!r} is missing; CXX names another")
    sources = [path.read_bytes() for path in _SOURCES + _HEADERS]
    made_of = (sources, repr(flags), compiler, os.path.getmtime(compiler), torch.__version__, _processor())
    name = f"kernels-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    reasons = []
    for folder in _folders():
        try:
            return _find_or_compile(compiler, flags, folder, name)
        except OSError as error:  # a home that cannot be written to
            reasons.append(str(error))
    raise RuntimeError(f"there is no folder for its kernels: {'; '.join(reasons)}. Set TORCH_EXTENSIONS_DIR")


def _find_or_compile(compiler: str, flags: list[str], folder: Path, name: str) -> Path:
    # The library that is found in it is run: nobody else may write there, and no link may lead elsewhere.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is a link, or others than this user may write to it")
    if (folder / name).is_file():
        return folder / name
    # One process compiles, and the others wait; the system releases the lock of one that is killed.
    lock_path = folder / f"{name}.lock"
    with open(lock_path, "w") as lock:
        with contextlib.suppress(OSError):  # file systems without locks: several processes compile
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not (folder / name).is_file():
                _compile(compiler, flags, folder, name)
        finally:
            lock_path.unlink(missing_ok=True)
    return folder / name


def _compile(compiler: str, flags: list[str], folder: Path, name: str) -> None:
    logger.warning(
        "Compiling kernels for this processor with %s: about ten seconds, once. They are kept in %s. The environment "
        "variable DIFFUSERS_HDIT_KERNELS=0 switches them off.",
        compiler,
        folder,
    )
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *map(str, _SOURCES), "-o", unfinished, *flags], capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            errors = errors or [f"it ended with {done.returncode}"]
            raise RuntimeError(f"its kernels do not compile: {compiler} says {' '.join(errors[:2])}")
        os.replace(unfinished, folder / name)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _paths() -> list[str]:
    """Return the compiler's flags for PyTorch; its OpenMP before the system's, or two of them would keep threads busy."""
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
    """Describe the processor: a home folder may be shared by machines with others, on which "native" code fails."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine()


_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    """Return the loaded kernels; raise RuntimeError or OSError where there can be none."""
    global _library
    if _library is None:
        _library = ctypes.CDLL(str(library_path()))
    return _library


def call(function: str, *arguments: Tensor | None | list[int] | int | float) -> None:
    """
    Call a kernel with tensors as pointers to their data (None: a null pointer), lists of whole numbers as pointers too,
    whole numbers as 64 bits, and other numbers as float32.
    """
    kernel = getattr(library(), function)
    kernel.restype = None
    kernel(*map(_as_c, arguments))


def _as_c(argument: Tensor | None | list[int] | int | float):
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, list):
        return (ctypes.c_int64 * len(argument))(*argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None) if argument is None else ctypes.c_float(argument)
