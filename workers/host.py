"""What a rank asks of its process before it computes, and how processes are told apart and ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Sequence

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, the host's or a GPU's, was too small for what was asked."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)  # torch's, on a CPU


def born(pid: int) -> int | None:
    """When a process began, in the kernel's ticks: with its id it names a process for good. None where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rsplit(b")", 1)[1].split()[19])
    except OSError:
        return None


def kill_processes(processes: Sequence[tuple[int, int | None]], grace_s: float, timeout_s: float) -> list[int]:
    """See these (pid, born) of this machine end: by themselves within `grace_s`, else by SIGKILL, which ends stopped
    ones too. Those that live on after `timeout_s`."""
    left = _wait([process for process in processes if process[1] is not None], grace_s)
    for pid, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [pid for pid, _ in _wait(left, timeout_s)]


def _wait(left: list[tuple[int, int | None]], timeout_s: float) -> list[tuple[int, int | None]]:
    deadline = time.monotonic() + timeout_s
    while left := [(pid, since) for pid, since in left if born(pid) == since and not _is_zombie(pid)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rsplit(b")", 1)[1].split()[0] == b"Z"
    except OSError:
        return True
