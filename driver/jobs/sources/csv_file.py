"""CSV with a header line. All values are text, as they stand: an id 007 stays one. Empty optional ones are null."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.sources.registry import SourceRow, Start


def read_rows(file: InputFile, max_line_bytes: int, start: Start) -> Iterator[SourceRow]:
    """Rows of a CSV file; blank lines are no rows. It is always read from its header on."""
    return (row for row in _all_rows(file, max_line_bytes) if row.line > start.line)


def _all_rows(file: InputFile, max_line_bytes: int) -> Iterator[SourceRow]:
    csv.field_size_limit(max_line_bytes)
    with file.open() as opened:
        # Bytes that are not UTF-8 survive as surrogates, so that only their own row is at fault.
        text = io.TextIOWrapper(opened, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            raise ValueError(f"{file.name}: the header names a column twice: {header}")
        optional = [name for name, other in file.optional if other in header]
        while True:
            start = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                code = "line_too_long" if "field larger" in str(error) else "invalid_csv"
                yield SourceRow(start, b"", fault=Fault(code, "read", f"not CSV: {error}"))
                continue
            if values:
                yield _row(start, header, values, optional)


def _row(start: int, header: list[str], values: list[str], optional: list[str]) -> SourceRow:
    if len(values) != len(header):
        message = f"{len(values)} values, but the header names {len(header)} columns"
        return SourceRow(start, b"", fault=Fault("invalid_csv", "read", message))
    columns: dict[str, Any] = dict(zip(header, values, strict=True))
    for name in optional:  # CSV has no other way to say that a row has none
        if columns.get(name) == "":
            columns[name] = None
    try:
        raw = json.dumps(columns, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return SourceRow(start, b"", fault=Fault("invalid_utf8", "read", "the row is not UTF-8"))
    return SourceRow(start, raw)
