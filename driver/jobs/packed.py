"""Rows as they travel between the stages of a pipeline: Arrow tables of bytes and numbers, no Python objects."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.keys import KEY_BYTES
from shoal.driver.jobs.prepare import Ready
from shoal.driver.jobs.scan import InputRow
from shoal.driver.jobs.sources.registry import SourceRow

LINES = pa.schema(
    [
        ("file", pa.int32()),
        ("line", pa.int64()),
        ("end", pa.int64()),
        ("raw", pa.large_binary()),
        ("fault", pa.binary()),
    ]
)
ROWS = pa.schema(
    [
        *LINES,
        ("row_id", pa.binary()),
        ("id_hash", pa.binary(KEY_BYTES)),
        ("key", pa.binary(KEY_BYTES)),
        ("token_ids", pa.large_binary()),  # int32; null where the row needs no engine
        ("sampling", pa.binary()),
    ]
)


@dataclass(slots=True)
class PackedRow:
    """A row of the input on its way from a task to the job."""

    row: InputRow
    file: int  # its number
    end: int  # as a SourceRow has it
    token_ids: bytes | None
    sampling: bytes | None


def pack_lines(file: int, sources: Sequence[SourceRow]) -> Any:
    """A LINES table of rows of one file."""
    columns = [
        pa.array(np.full(len(sources), file, np.int32)),
        [source.line for source in sources],
        [source.end for source in sources],
        [source.raw for source in sources],
        [_dump(source.fault) for source in sources],
    ]
    return pa.table(columns, schema=LINES)


def lines_of(table: Any) -> Iterator[tuple[int, SourceRow]]:
    """File number and row, one by one."""
    for file, line, end, raw, fault in zip(*(table[name].to_pylist() for name in LINES.names), strict=True):
        yield file, SourceRow(line, raw, _load(fault), end)


def pack_rows(lines: Any, rows: Sequence[InputRow], ready: Sequence[Ready | None]) -> Any:
    """A ROWS table. `lines`: the LINES table of the same rows."""
    columns = [
        lines["file"],
        lines["line"],
        lines["end"],
        [row.raw for row in rows],
        [_dump(row.fault) for row in rows],
        [row.row_id.encode("utf-8", "surrogatepass") for row in rows],
        [row.id_hash for row in rows],
        [row.key for row in rows],
        [None if one is None else pack_ids(one.token_ids) for one in ready],
        [None if one is None else one.sampling.encode("utf-8", "surrogatepass") for one in ready],
    ]
    return pa.table(columns, schema=ROWS)


def rows_of(table: Any, first_index: int, names: Sequence[str]) -> list[PackedRow]:
    """Rows again, numbered from `first_index`. `names`: of all files."""
    found = []
    columns = [table[name].to_pylist() for name in ROWS.names]
    for index, (file, line, end, raw, fault, row_id, id_hash, key, ids, sampling) in enumerate(
        zip(*columns, strict=True), first_index
    ):
        text = row_id.decode("utf-8", "surrogatepass")
        row = InputRow(index, names[file], line, raw, text, id_hash, key, _load(fault))
        found.append(PackedRow(row, file, end, ids, sampling))
    return found


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as int32, in this machine's order. Of a list this takes a third of numpy's time."""
    return struct.pack(f"={len(ids)}i", *ids)


def unpack_ids(data: bytes) -> list[int]:
    """What was packed."""
    ids: list[int] = memoryview(data).cast("i").tolist()
    return ids


def _dump(fault: Fault | None) -> bytes | None:
    return None if fault is None else json.dumps(asdict(fault)).encode()


def _load(data: bytes | None) -> Fault | None:
    return None if data is None else Fault(**json.loads(data))
