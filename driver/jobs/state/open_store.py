"""The right kind of state store for a place."""

from __future__ import annotations

import inspect
from typing import Any

from shoal.driver.jobs.state.folder import Folder
from shoal.driver.jobs.state.objects import Objects
from shoal.driver.jobs.state.store import StateStore


def open_store(filesystem: Any, path: str, *, local: bool, rows: int, seconds: float) -> StateStore:
    """Files that are appended to on a local file system, else whole objects. ValueError where neither is safe."""
    if local:
        return Folder(path)
    if not _knows_conditional_writes(filesystem):
        raise ValueError(
            f"the store of {path!r} ({type(filesystem).__name__}) has no conditional writes, which keep two runs of a "
            "job apart: write to a local path and copy the result"
        )
    return Objects(filesystem, path, rows, seconds)


def _knows_conditional_writes(filesystem: Any) -> bool:
    """Whether pipe_file takes mode="create"; one that does not would silently overwrite."""
    method = getattr(filesystem, "_pipe_file", None) or filesystem.pipe_file
    return "mode" in inspect.signature(method).parameters
