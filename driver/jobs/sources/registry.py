"""SOURCES: how each format becomes rows. A new format is a module with `read_rows` and one row here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.files import InputFile

SOURCES = {
    "csv": "shoal.driver.jobs.sources.csv_file:read_rows",
    "jsonl": "shoal.driver.jobs.sources.jsonl:read_rows",
    "parquet": "shoal.driver.jobs.sources.parquet:read_rows",
}


@dataclass(slots=True)
class SourceRow:
    """One row as it was read: its bytes, for its key; its columns are unpacked only when they are needed."""

    line: int  # in its file, from 1: the line where it starts, or the row of a Parquet file
    raw: bytes
    unpack: Callable[[bytes], dict[str, Any]] | None = None  # may raise RowError
    fault: Fault | None = None  # it could not be read at all

    def columns(self) -> dict[str, Any]:
        """Its columns. RowError where its bytes are none."""
        assert self.unpack is not None, "a row with a fault has no columns"
        return self.unpack(self.raw)


def read_rows(file: InputFile, max_line_bytes: int) -> Iterator[SourceRow]:
    """All rows of a file, in order; what cannot be read comes as a row with its fault."""
    module, name = SOURCES[file.format].split(":")
    reader: Callable[[InputFile, int], Iterator[SourceRow]] = getattr(import_module(module), name)
    return reader(file, max_line_bytes)
