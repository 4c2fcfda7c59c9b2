"""State on a file system: one append-only file an epoch."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

from shoal.driver.jobs.state.store import NO_ROOM, LedgerFullError, PartWriter, StateStore, epoch_of, part_name

_CHUNK = 4 << 20


class Folder(StateStore):
    """A folder that this machine can append to."""

    appends = True

    def __init__(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)
        self.path = path
        self._maps: dict[str, mmap.mmap] = {}
        self._claimed: dict[int, int] = {}

    def claim(self, epoch: int) -> None:
        """The epoch's file is its claim: only one process can create it."""
        path = os.path.join(self.path, part_name(epoch))
        self._claimed[epoch] = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
        sync_folder(self.path)

    def is_claimed(self, epoch: int) -> bool:
        """Whether the epoch's file is there."""
        return os.path.exists(os.path.join(self.path, part_name(epoch)))

    def writer(self, epoch: int) -> PartWriter:
        """The one writer of an epoch that was claimed here."""
        return _Appender(self._claimed.pop(epoch), part_name(epoch))

    def names(self) -> dict[str, int]:
        """Files and their sizes; half-written ones are none."""
        found = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.is_file() and not entry.name.endswith(".tmp"):
                    found[entry.name] = entry.stat().st_size
        return found

    def chunks(self, name: str, size: int, start: int = 0) -> Iterator[bytes]:
        """Reads from `start` up to `size`."""
        with open(os.path.join(self.path, name), "rb") as file:
            file.seek(start)
            while start < size and (data := file.read(min(_CHUNK, size - start))):
                start += len(data)
                yield data

    def record(self, name: str, offset: int) -> bytes:
        """From a map of the file, made anew where the file has grown since."""
        known = self._maps.get(name)
        end = -1 if known is None else known.find(b"\n", offset)
        if known is None or end < 0:
            with open(os.path.join(self.path, name), "rb") as file:
                known = self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            end = known.find(b"\n", offset)
            assert end >= 0, f"{name} has no whole line at {offset}"
        return known[offset:end]

    def put(self, name: str, data: bytes) -> None:
        """By rename."""
        write_whole(os.path.join(self.path, name), data)

    def get(self, name: str) -> bytes | None:
        """The file's bytes."""
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def discard(self, names: list[str]) -> None:
        """Empties parts, whose existence is the claim; removes the rest."""
        for name in names:
            path = os.path.join(self.path, name)
            if epoch_of(name) is None:
                os.unlink(path)
            else:
                os.truncate(path, 0)

    def close(self) -> None:
        """Lets go of maps and of a claimed file that was never written."""
        for known in self._maps.values():
            known.close()
        self._maps.clear()
        for handle in self._claimed.values():
            os.close(handle)
        self._claimed.clear()


class _Appender(PartWriter):
    """Writes and fsyncs; after a failed write the file is cut back to what was durable."""

    def __init__(self, handle: int, name: str) -> None:
        self._handle, self._name = handle, name
        self._durable = 0
        self._taken = 0
        self._buffer: list[bytes] = []

    def append(self, data: bytes) -> tuple[str, int]:
        """Into memory."""
        offset = self._taken
        self._buffer.append(data)
        self._taken += len(data)
        return self._name, offset

    def sync(self, force: bool) -> bool:
        """To the disk."""
        if not self._buffer:
            return False
        data = memoryview(b"".join(self._buffer))
        try:
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, self._durable)
            if error.errno in NO_ROOM:
                raise LedgerFullError(error.errno, f"{self._name}: {error.strerror}") from error
            raise
        self._durable = self._taken
        self._buffer.clear()
        return True

    def close(self) -> None:
        """Closes the file."""
        os.close(self._handle)


def write_whole(path: str, data: bytes) -> None:
    """A file whole or not at all, durable when this returns."""
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(path: str) -> None:
    """Makes names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
