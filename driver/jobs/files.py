"""Addresses to input files: local paths, folders, globs, and whatever fsspec or pyarrow can open."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
STATE_SUFFIX = ".shoal"  # of a folder with the state of a job, beside its output
_SAMPLE = 1 << 16  # bytes of each end of a file that its identity is taken from


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input."""

    filesystem: Any
    path: str  # inside the filesystem
    name: str  # for messages and row ids: relative to the folder that was given, else the file's own name
    size: int
    format: str
    optional: tuple[tuple[str, str], ...] = ()  # columns of CSV in which an empty cell is none, if the second is there
    columns: frozenset[str] | None = None  # that are asked for: a format that can reads no others; None: all

    def open(self) -> IO[bytes]:
        """Its bytes, decompressed."""
        opened: IO[bytes] = self.filesystem.open(self.path, "rb", compression=self.compression)
        return opened

    @property
    def compression(self) -> str | None:
        """By the name's ending."""
        return COMPRESSIONS.get(os.path.splitext(self.path)[1])

    def identity(self) -> list[Any]:
        """What tells this file from another version of itself, without reading it all."""
        with self.filesystem.open(self.path, "rb") as file:
            digest = hashlib.blake2b(file.read(_SAMPLE), digest_size=16)
            if self.size > _SAMPLE:
                file.seek(max(_SAMPLE, self.size - _SAMPLE))
                digest.update(file.read())
        return [self.name, self.size, digest.hexdigest()]


def filesystem_of(address: str) -> tuple[Any, str]:
    """The filesystem of an address, and the path in it. ValueError where nothing can open the address."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(address))
    except (ImportError, ValueError) as first:
        try:
            return _arrow_filesystem(address)
        except (ImportError, ValueError, OSError) as second:
            raise ValueError(f"{address!r} cannot be opened: fsspec says {first}; pyarrow says {second}") from None
    return filesystem, str(path)


def _arrow_filesystem(address: str) -> tuple[Any, str]:
    import pyarrow.fs
    from fsspec.implementations.arrow import ArrowFSWrapper

    found, path = pyarrow.fs.FileSystem.from_uri(address)
    return ArrowFSWrapper(found), path


def find_inputs(
    addresses: Sequence[str], format_: str, leave_out: Callable[[Any, str], bool] = lambda filesystem, path: False
) -> list[InputFile]:
    """All files of the addresses, each address's in the order of their names. ValueError where there are none.

    `leave_out(filesystem, path)`: of the files that a folder or a glob brings, those that are not asked for.
    """
    files: list[InputFile] = []
    for address in addresses:
        found = _expand(address, format_, leave_out)
        if not found:
            raise ValueError(f"input {address!r}: no {'such' if format_ == 'auto' else format_} files found")
        files += found
    seen: set[tuple[str, str]] = set()
    for file in files:
        key = (str(file.filesystem.protocol), file.path)
        if key in seen:
            raise ValueError(f"input names {file.path!r} twice")
        seen.add(key)
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return files
    return [InputFile(f.filesystem, f.path, f.path, f.size, f.format) for f in files]


def with_columns(files: Sequence[InputFile], columns: frozenset[str] | None) -> list[InputFile]:
    """The files, with nothing else asked for than those columns; None: all of them."""
    return [replace(file, columns=columns) for file in files]


def _expand(address: str, format_: str, leave_out: Callable[[Any, str], bool]) -> list[InputFile]:
    filesystem, path = filesystem_of(address)
    if any(sign in path for sign in "*?[") and not filesystem.exists(path):
        base = path[: min(path.index(sign) for sign in "*?[" if sign in path)].rsplit("/", 1)[0]
        found = [name for name in _visible(filesystem.glob(path), base) if not leave_out(filesystem, name)]
        return _described(filesystem, found, base, format_)
    if filesystem.isdir(path):
        inside = _visible(filesystem.find(path), path)
        known = [name for name in inside if format_ != "auto" or format_of(name) is not None]
        return _described(filesystem, [name for name in known if not leave_out(filesystem, name)], path, format_)
    if not filesystem.exists(path):
        raise ValueError(f"input {address!r} does not exist")
    return _described(filesystem, [path], os.path.dirname(path), format_)


def _visible(paths: list[str], base: str) -> list[str]:
    """Without what starts with _ or . below the folder that was named, or is in a folder of a job's state."""
    start = len(base.rstrip("/")) + 1
    return sorted(path for path in paths if _is_visible(path[start:].split("/")))


def _is_visible(parts: list[str]) -> bool:
    return not any(part[:1] in "_." for part in parts) and not any(part.endswith(STATE_SUFFIX) for part in parts[:-1])


def _described(filesystem: Any, paths: list[str], base: str, format_: str) -> list[InputFile]:
    files = []
    start = len(base.rstrip("/")) + 1 if base else 0
    for path in paths:
        info = filesystem.info(path)
        if info["type"] != "file":
            continue
        kind = format_ if format_ != "auto" else format_of(path)
        if kind is None:
            raise ValueError(f"the format of {path!r} is not known by its ending: set input_format ({_kinds()})")
        files.append(InputFile(filesystem, path, path[start:], int(info["size"]), kind))
    return files


def format_of(path: str) -> str | None:
    """The format that a name's ending means."""
    base, ending = os.path.splitext(path)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(base)[1]
    return FORMATS.get(ending)


def _kinds() -> str:
    return ", ".join(sorted(set(FORMATS.values())))
