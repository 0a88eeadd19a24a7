"""Write files and folders so that a reader never sees half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """
    Yield a temporary path beside `path`, and give it that name at the end of the block.

    What the block writes there, a file or a folder, replaces the file `path` at once. If the block raises, the temporary
    path is removed and `path` is what it was before. Its name begins with `.partial-` and keeps the suffix of `path`.

    Args:
        durable: also wait until the file is on the disk, so that it survives a crash of the machine.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    remove(partial)
    try:
        yield partial
        if durable:
            for written in (*(partial.rglob("*") if partial.is_dir() else ()), partial):
                synchronize(written)
        os.replace(partial, path)
    finally:
        remove(partial)
    if durable:
        synchronize(path.parent)


def write_atomically(path: str | os.PathLike, content: str | bytes, durable: bool = False) -> None:
    """Write a text (as UTF-8) or bytes to `path`, which is either what it was before or has all of the new content."""
    with atomic_path(path, durable) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def check_writable(folder: Path) -> None:
    """
    Check that files can be written into a folder, which is made for that and removed again if it is not there.

    Raises:
        OSError: if not, with the reason.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()


def synchronize(path: Path) -> None:
    """Wait until the file or folder at `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with its contents, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def default_cache_dir(cache_dir: str | os.PathLike | None = None) -> Path:
    """Return the folder for what can be computed again: `cache_dir`, or `diffusers_hdit` in `$XDG_CACHE_HOME`."""
    return Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "diffusers_hdit").expanduser())
