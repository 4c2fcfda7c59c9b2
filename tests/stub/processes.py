"""Processes of the tests' own Ray, found by what Ray calls them. Others on the machine are never touched."""

from __future__ import annotations

import os
from pathlib import Path


def descendants(of: int | None = None) -> list[int]:
    """Children of a process (this one unless said), their children, and so on."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(text.rsplit(")", 1)[1].split()[1])
    found, more = [], {os.getpid() if of is None else of}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more}
        found += sorted(more)
    return found


def title(pid: int) -> str:
    """What a process calls itself: Ray names a worker after its actor or task."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode("utf-8", "replace")
    except OSError:
        return ""


def named(prefix: str | tuple[str, ...], of: int | None = None) -> list[int]:
    """Those of them whose title begins so."""
    return [pid for pid in descendants(of) if title(pid).startswith(prefix)]
