"""JSONL: rows are lines already."""

from __future__ import annotations

from typing import IO


class JsonlSink:
    """A line a row."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, row: bytes) -> None:
        """Adds a line."""
        self._stream.write(row + b"\n")

    def finish(self) -> None:
        """Nothing is held back."""
