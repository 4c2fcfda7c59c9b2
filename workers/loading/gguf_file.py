"""The header of a GGUF file: metadata and where each tensor lies. Torch-free, so that the driver may use it.

gguf.GGUFReader makes a numpy array of every string of the vocabulary (4 s for 100,000 of them); this reads the same in
about 0.1 s and says which file is broken and how. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape`: outermost first, as torch has it; the last one is contiguous in the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int  # a gguf.GGMLQuantizationType
    offset: int  # bytes from the file's start
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A parsed header."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """general.architecture, such as "llama"."""
        return str(self.metadata["general.architecture"])

    def integer(self, key: str, default: int | None = None) -> int:
        """The number `key` under the architecture's own prefix.

        Raises ValueError, naming the file, when it is not stated, or differs between layers.
        """
        value = self.value(key, default)
        values = value if isinstance(value, list) else [value]
        if len(set(values)) != 1:
            raise ValueError(f"{self.path}: {key} differs between layers, which is not supported: {value}")
        return int(values[0])

    def value(self, key: str, default: Any = None) -> Any:
        """What `key` under the architecture's own prefix says; ValueError when it is absent and has no default."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{self.path} does not state {self.architecture}.{key}")
        return value


def read_gguf(path: str | Path) -> GgufFile:
    """Parse the header of `path`.

    Raises ValueError, naming the file, when it is no GGUF file of versions 2-3, is cut short, is one part of a split
    file, or has a tensor type that the gguf package does not know.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is no GGUF file: it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            parsed = _parse(path, data)
    except (struct.error, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no valid GGUF file: its header is cut short or corrupt ({error})") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if "general.architecture" not in parsed.metadata:
        raise ValueError(f"{path} does not state general.architecture")
    if int(parsed.metadata.get("split.count", 1)) > 1:
        raise ValueError(f"{path} is one part of a split GGUF: merge the parts first (llama-gguf-split --merge)")
    return parsed


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) != length:
            raise struct.error(f"a string of {length} bytes at {self.at} passes the end")
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, count = self.scalar("I"), self.scalar("Q")
            if item in _SCALARS:
                form = f"<{count}{_SCALARS[item]}"
                values = list(struct.unpack_from(form, self.data, self.at))
                self.at += struct.calcsize(form)
                return values
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"unknown value type {kind} at byte {self.at}")
        return self.scalar(_SCALARS[kind])


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    if data[:4] != MAGIC:
        raise ValueError(f"{path} is no GGUF file: it starts with {bytes(data[:4])!r}")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise ValueError(f"{path} has GGUF version {version}; little-endian versions {VERSIONS} can be read")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("I"))
    rows = [_tensor_row(cursor) for _ in range(num_tensors)]
    alignment = int(metadata.get("general.alignment", 32))
    if alignment < 1:
        raise struct.error(f"general.alignment is {alignment}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: _place(path, name, shape, type_id, start + offset, len(data)) for name, shape, type_id, offset in rows
    }
    return GgufFile(path, metadata, tensors)


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = cursor.text(), cursor.scalar("I")
    if dims > MAX_DIMS:
        raise struct.error(f"tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _place(path: Path, name: str, shape: tuple[int, ...], type_id: int, offset: int, file_size: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    except (ValueError, KeyError):
        raise ValueError(f"{path}: tensor {name!r} has type {type_id}, which the gguf package does not know") from None
    if not shape or shape[-1] % block:
        raise ValueError(f"{path}: tensor {name!r} of shape {shape} does not divide into blocks of {block}")
    num_bytes = math.prod(shape) // block * block_bytes
    if offset + num_bytes > file_size:
        raise ValueError(
            f"{path} is cut short: tensor {name!r} ends at byte {offset + num_bytes}, the file at {file_size}"
        )
    return GgufTensor(name, shape, type_id, offset, num_bytes)
