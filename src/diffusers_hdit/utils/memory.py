"""What the C library does with memory that a program has freed."""

import ctypes
import platform


# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """
    Has glibc keep freed memory for the next use, as the allocator of a GPU does. Left to itself it hands every buffer over
    32 MB back to the system and takes it anew, to be zeroed page by page, at each use. It holds for the whole process: for
    programs, not for libraries.

    Returns:
        Whether this was possible; other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, 2**28)])
