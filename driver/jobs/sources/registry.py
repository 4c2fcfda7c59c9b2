"""SOURCES: how each format becomes rows. A new format is a module with `read_rows` and one row here."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import orjson

from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.files import InputFile

SOURCES = {
    "csv": "shoal.driver.jobs.sources.csv_file:read_rows",
    "jsonl": "shoal.driver.jobs.sources.jsonl:read_rows",
    "parquet": "shoal.driver.jobs.sources.parquet:read_rows",
}


@dataclass(slots=True)
class SourceRow:
    """One row as it was read: a JSON object in bytes, whatever the format. They make its key, and travel."""

    line: int  # in its file, from 1: the line where it starts, or the row of a Parquet file
    raw: bytes
    fault: Fault | None = None  # it could not be read at all
    end: int = 0  # bytes of its file up to its end, where the format can be read from there; else 0


@dataclass(frozen=True, slots=True)
class Start:
    """Where in a file reading begins: after the row of a line, which ended at a byte. Both are of a SourceRow."""

    line: int = 0
    offset: int = 0


BEGINNING = Start()
_BAD_BZ2 = "Invalid data stream"  # all that its OSError says
_DIGITS, _LONG_NUMBER = bytes.maketrans(b"123456789", b"0" * 9), b"0" * 19


def parse_object(raw: bytes) -> dict[str, Any]:
    """The columns of a row, as the standard library reads them. RowError where its bytes are no JSON object."""
    try:
        found = _load(raw)
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} of the line is not UTF-8 ({error.reason})"
        raise RowError("invalid_utf8", "read", message) from None
    except (ValueError, RecursionError) as error:
        raise RowError("invalid_json", "read", f"the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        message = f"the line holds a JSON {type(found).__name__}, not an object"
        raise RowError("not_an_object", "read", message)
    return found


def _load(raw: bytes) -> Any:
    if _LONG_NUMBER in raw.translate(_DIGITS):  # orjson makes a float of a whole number beyond 64 bits
        return json.loads(raw.decode("utf-8"))
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:  # the standard library says better why, or takes it: NaN
        return json.loads(raw.decode("utf-8"))


def columns_of(raw: bytes) -> dict[str, Any] | None:
    """The columns of a row, None where it has none: the output shows what can be shown of a row in error."""
    try:
        return parse_object(raw)
    except RowError:
        return None


def read_rows(file: InputFile, max_line_bytes: int, start: Start = BEGINNING) -> Iterator[SourceRow]:
    """Rows of a file from a place on, in order; what cannot be read comes as a row with its fault."""
    module, name = SOURCES[file.format].split(":")
    reader: Callable[[InputFile, int, Start], Iterator[SourceRow]] = getattr(import_module(module), name)
    rows = reader(file, max_line_bytes, start)
    return rows if file.compression is None else _decompressed(file, rows)


def _decompressed(file: InputFile, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    """The rows. ValueError where the file's bytes are not what its ending says."""
    try:
        yield from rows
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise _broken(file, error) from None
    except OSError as error:
        if error.errno is not None or str(error) != _BAD_BZ2:  # the store's own trouble
            raise
        raise _broken(file, error) from None


def _broken(file: InputFile, error: Exception) -> ValueError:
    return ValueError(f"input {file.path!r} cannot be decompressed: it is no whole {file.compression} file: {error}")
