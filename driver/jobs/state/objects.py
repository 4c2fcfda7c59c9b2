"""State on an object store: the ledger is a row of whole objects; an epoch is an object that only one can create."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from shoal.driver.jobs.state.store import PartWriter, StateStore, claim_name, part_name

_CACHED_OBJECTS = 16


class Objects(StateStore):
    """A prefix of a store that fsspec opens and that knows conditional writes (mode="create")."""

    appends = False

    def __init__(self, filesystem: Any, path: str, rows: int, seconds: float) -> None:
        """An object is written after `rows` records, or once its oldest one is `seconds` old."""
        self._filesystem, self._path = filesystem, path.rstrip("/")
        self._rows, self._seconds = rows, seconds
        self._cache: OrderedDict[str, bytes] = OrderedDict()

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def claim(self, epoch: int) -> None:
        """A conditional write."""
        self._filesystem.pipe_file(self._at(claim_name(epoch)), b"{}", mode="create")

    def is_claimed(self, epoch: int) -> bool:
        """Asks the store anew, never a cached listing."""
        self._filesystem.invalidate_cache()
        return bool(self._filesystem.exists(self._at(claim_name(epoch))))

    def writer(self, epoch: int) -> PartWriter:
        """Writes objects of that epoch."""
        return _ObjectWriter(self._filesystem, self._path, epoch, self._rows, self._seconds)

    def names(self) -> dict[str, int]:
        """Objects directly below the prefix."""
        self._filesystem.invalidate_cache()
        try:
            listing = self._filesystem.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        return {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in listing if e["type"] == "file"}

    def chunks(self, name: str, size: int, start: int = 0) -> Iterator[bytes]:
        """An object is small: one piece."""
        yield self._filesystem.cat_file(self._at(name))[start:size]

    def record(self, name: str, offset: int) -> bytes:
        """From the object, of which the last few that were used are kept."""
        data = self._cache.get(name)
        if data is None:
            data = self._cache[name] = self._filesystem.cat_file(self._at(name))
            if len(self._cache) > _CACHED_OBJECTS:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(name)
        return data[offset : data.index(b"\n", offset)]

    def put(self, name: str, data: bytes) -> None:
        """Objects are whole by nature."""
        self._filesystem.pipe_file(self._at(name), data)

    def get(self, name: str) -> bytes | None:
        """The object's bytes."""
        try:
            return bytes(self._filesystem.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def discard(self, names: list[str]) -> None:
        """Deletes the objects; claims are objects of their own."""
        if names:
            self._filesystem.rm([self._at(name) for name in names])

    def close(self) -> None:
        """Forgets what it read."""
        self._cache.clear()


class _ObjectWriter(PartWriter):
    def __init__(self, filesystem: Any, path: str, epoch: int, rows: int, seconds: float) -> None:
        self._filesystem, self._path, self._epoch = filesystem, path, epoch
        self._rows, self._seconds = rows, seconds
        self._number = 0
        self._buffer: list[bytes] = []
        self._size = 0
        self._oldest = 0.0

    def append(self, data: bytes) -> tuple[str, int]:
        """Into memory, for the next object."""
        if not self._buffer:
            self._oldest = time.monotonic()
        offset = self._size
        self._buffer.append(data)
        self._size += len(data)
        return part_name(self._epoch, self._number), offset

    def sync(self, force: bool) -> bool:
        """One object, when there is enough for it. mode="create": nothing may ever replace a part."""
        due = len(self._buffer) >= self._rows or time.monotonic() - self._oldest >= self._seconds
        if not self._buffer or not (force or due):
            return False
        name = part_name(self._epoch, self._number)
        self._filesystem.pipe_file(f"{self._path}/{name}", b"".join(self._buffer), mode="create")
        self._number += 1
        self._buffer.clear()
        self._size = 0
        return True

    def close(self) -> None:
        """Holds nothing."""
