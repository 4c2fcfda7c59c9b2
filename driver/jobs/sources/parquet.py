"""Parquet: read batch by batch, so that a file of any size takes little memory."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterator
from typing import Any

from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.sources.registry import SourceRow, Start

_BATCH_ROWS = 256


def read_rows(file: InputFile, max_line_bytes: int, start: Start) -> Iterator[SourceRow]:
    """Rows of a Parquet file; values that JSON does not have (times, decimals) become text."""
    import pyarrow.parquet

    with file.open() as opened:
        try:
            table = pyarrow.parquet.ParquetFile(opened)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file.name} is not a Parquet file: {error}") from None
        wanted = file.columns
        names = None if wanted is None else [name for name in table.schema_arrow.names if name in wanted]
        number = 0
        for batch in table.iter_batches(_BATCH_ROWS, columns=names):
            skipped = min(batch.num_rows, max(0, start.line - number))
            number += skipped
            for columns in batch.slice(skipped).to_pylist():
                number += 1
                # Arrow takes a name with a dot for a path too, and brings what lies there with it.
                yield _row(number, columns if wanted is None else {n: v for n, v in columns.items() if n in wanted})


def _row(number: int, columns: dict[str, Any]) -> SourceRow:
    try:
        raw = json.dumps(columns, default=_plain, ensure_ascii=True, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        message = f"{_culprit(columns)}{error}: name the columns to keep (columns), without it"
        return SourceRow(number, repr(columns).encode(), Fault("invalid_value", "read", message))
    return SourceRow(number, raw)


def _culprit(columns: dict[str, Any]) -> str:
    for name, value in columns.items():
        try:
            json.dumps(value, default=_plain)
        except (TypeError, ValueError):
            return f"column {name!r}: "
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be written to the output")
