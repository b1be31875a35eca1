"""The memory of a process that trains on a CPU."""

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """From now on the process keeps what it frees for itself, instead of giving large blocks back to the
    system: a training step takes the same gigabytes as the step before, and to get them anew the system
    zeroes every page of them first.

    It concerns the whole process, so a program calls it for itself; no library does.

    Returns:
        whether there is a glibc that takes the request.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another system or C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
