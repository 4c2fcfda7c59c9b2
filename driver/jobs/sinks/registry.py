"""SINKS: how rows become a file of the output. A new format is a module with one class and one row here."""

from __future__ import annotations

from importlib import import_module
from typing import IO, Protocol

SINKS = {
    "jsonl": "shoal.driver.jobs.sinks.jsonl:JsonlSink",
    "parquet": "shoal.driver.jobs.sinks.parquet:ParquetSink",
}


class Sink(Protocol):
    """One file in the making. Rows come as JSON text, in the order they are to have."""

    def write(self, row: bytes) -> None:
        """Adds a row."""
        ...

    def finish(self) -> None:
        """Writes what is left; the file is whole then. The stream stays open."""
        ...


def make_sink(format_: str, stream: IO[bytes]) -> Sink:
    """A sink that writes to `stream`."""
    module, name = SINKS[format_].split(":")
    sink: Sink = getattr(import_module(module), name)(stream)
    return sink
