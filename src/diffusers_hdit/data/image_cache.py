"""Decoded images in memory that a process shares with the DataLoader workers that it forks."""

import mmap
import os
from collections.abc import Callable

import numpy as np


# Shares of the free memory: what "auto" takes at most, and the limit for True. Several processes on a machine keep a
# cache each, and divide these.
AUTO_SHARE, LARGEST_SHARE = 0.25, 0.8


class ImageCache:
    """
    Keep arrays of known shapes in memory that forked processes share.

    Memory is taken as arrays are put, and freed with the object. Workers that are spawned don't share it: a pickled
    copy is empty and keeps nothing.

    Args:
        shapes: (N, 3) int64, the shape (C, H, W) of each array; one without elements is not kept.
        dtype: of all arrays.
    """

    def __init__(self, shapes: np.ndarray, dtype: str):
        self.shapes, self.dtype = shapes, np.dtype(dtype)
        sizes = shapes.prod(axis=1) * self.dtype.itemsize
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        # Not torch's shared memory: that lies in /dev/shm, which containers keep small.
        self.buffer = mmap.mmap(-1, max(1, int(self.offsets[-1])))
        self.filled = np.frombuffer(mmap.mmap(-1, max(1, len(shapes))), np.uint8)

    @property
    def nbytes(self) -> int:
        return int(self.offsets[-1])

    def holds(self, i: int) -> bool:
        """Return whether there is room for image i."""
        return self.buffer is not None and self.offsets[i + 1] > self.offsets[i]

    def get(self, i: int) -> np.ndarray | None:
        """Return image i, a read-only view (C, H, W), or None if it was not put yet."""
        if not self.filled[i]:
            return None
        array = self._view(i)
        array.flags.writeable = False
        return array

    def put(self, i: int, array: np.ndarray) -> None:
        self._view(i)[...] = array
        self.filled[i] = 1  # last: another worker may be looking

    def _view(self, i: int) -> np.ndarray:
        shape = tuple(int(n) for n in self.shapes[i])
        count = shape[0] * shape[1] * shape[2]
        return np.frombuffer(self.buffer, self.dtype, count, int(self.offsets[i])).reshape(shape)

    def __getstate__(self):
        return {**self.__dict__, "buffer": None, "filled": None}


def make_cache(make_shapes: Callable[[], np.ndarray], dtype: str, wanted: bool | str) -> ImageCache | None:
    """
    Return a cache, or None if none is wanted or it would take too much memory.

    Args:
        make_shapes: returns the shapes, see [`ImageCache`]; called only if they are needed.
        wanted: True, False, or "auto": if it takes at most a quarter of the free memory.

    Raises:
        ValueError: it is True, and the images don't fit.
    """
    if wanted is False:
        return None
    shapes = make_shapes()
    need = int(shapes.prod(axis=1).sum()) * np.dtype(dtype).itemsize
    room = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if wanted is True and need > LARGEST_SHARE * room:
        raise ValueError(
            f"cache_images: the decoded images take {need / 2**30:.1f} GiB, but {LARGEST_SHARE:.0%} of the free memory "
            f"of this process is {LARGEST_SHARE * room / 2**30:.1f} GiB. Leave it at 'auto', or lower the resolution."
        )
    return ImageCache(shapes, dtype) if wanted is True or need <= AUTO_SHARE * room else None


def available_memory() -> int:
    """Return how many bytes can be taken without swapping, in this machine and in this container."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
        # A control group, version 2 or 1. Its cache of files can be dropped, and is counted as free.
        for limit, usage, stat, key in (
            ("memory.max", "memory.current", "memory.stat", "inactive_file"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
        ):  # fmt: skip
            found.append(_group_room("/sys/fs/cgroup", limit, usage, stat, key))
    except (OSError, ValueError, KeyError):
        pass
    found = [n for n in found if n is not None]
    if found:
        return max(0, min(found))
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (OSError, ValueError, AttributeError):  # no POSIX system: "auto" keeps nothing
        return 0


def _group_room(root, limit, usage, stat, key) -> int | None:
    try:
        texts = []
        for name in (limit, usage, stat):
            with open(os.path.join(root, name), encoding="ascii") as file:
                texts.append(file.read())
        cached = dict(line.split() for line in texts[2].splitlines()).get(key, 0)
        return int(texts[0]) - int(texts[1]) + int(cached)
    except (OSError, ValueError):  # no such group, or "max"
        return None
