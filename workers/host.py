"""What a CPU rank asks of its process before it computes."""

from __future__ import annotations

import ctypes

# mallopt's parameter numbers (malloc.h)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEEP_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Tell malloc to keep freed memory instead of returning it: activations of one layer are the next layer's.

    By default glibc gives blocks of some MiB back to the kernel at each free, and the page faults of the next
    allocation cost more than the arithmetic (measured in a virtual machine, one thread: the gate of 2048 x 3072
    22 ms, then 6 ms; attention of 64 decoding rows 15 ms, then 5 ms). Call it in the rank's process, early: threads
    that allocated before keep their own arenas. False where the C library has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc: macOS, Windows, musl
        return False
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_THRESHOLD, _KEEP_BYTES), mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)])
