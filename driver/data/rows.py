"""Tables in, tables out: a table's rows as plain Python, and what an answer adds to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.driver.jobs.faults import Fault

STATE = "__shoal"  # column between the stages: a row made ready, or its fault
STATE_TYPE = pa.struct(
    [
        ("token_ids", pa.large_binary()),  # int32; null where the row has a fault
        ("prompt", pa.string()),
        ("sampling", pa.string()),
        ("stream", pa.uint64()),
        ("fault", pa.string()),
    ]
)
_LOGPROB = pa.struct(
    [("token_id", pa.int32()), ("logprob", pa.float64()), ("rank", pa.int32()), ("token", pa.string())]
)
_LOGPROBS = pa.list_(pa.list_(_LOGPROB))
_IDS = pa.list_(pa.int32())
_COMPLETION = pa.struct(
    [
        ("index", pa.int32()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("num_tokens", pa.int32()),
        ("token_ids", _IDS),
        ("logprobs", _LOGPROBS),
        ("cumulative_logprob", pa.float64()),
    ]
)
ERROR_TYPE = pa.struct([("code", pa.string()), ("stage", pa.string()), ("message", pa.string())])
ANSWER = {
    "generated_text": pa.string(),
    "generated_tokens": _IDS,
    "prompt_token_ids": _IDS,
    "num_input_tokens": pa.int32(),
    "num_generated_tokens": pa.int32(),
    "num_cached_tokens": pa.int32(),
    "finish_reason": pa.string(),
    "stop_reason": pa.string(),
    "cumulative_logprob": pa.float64(),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "completions": pa.list_(_COMPLETION),
}


def table_rows(table: Any) -> Iterator[dict[str, Any]]:
    """Rows as Ray Data shows them to a user's function."""
    from ray.data.block import BlockAccessor

    for row in BlockAccessor.for_block(table).iter_rows(public_row_format=True):
        yield dict(row)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A table of rows of plain Python; a column that a row lacks is null there."""
    from ray.data.block import BlockAccessor

    names = list(dict.fromkeys(name for row in rows for name in row))
    return BlockAccessor.batch_to_arrow_block({name: [row.get(name) for row in rows] for name in names})


def as_table(batch: Any) -> Any:
    """A batch as an Arrow table."""
    from ray.data.block import BlockAccessor

    return batch if isinstance(batch, pa.Table) else BlockAccessor.batch_to_arrow_block(batch)


def plain(value: Any) -> Any:
    """Arrays as lists and NumPy's numbers as Python's, at any depth."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def with_columns(table: Any, columns: Mapping[str, Any]) -> Any:
    """The table with these columns, in place of its own of the same name."""
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    return table


def answer_arrays(answers: Sequence[Mapping[str, Any]], faults: Sequence[Fault | None], error_column: str) -> Any:
    """The columns that answers add, for rows in order; a row with a fault has nulls in them."""
    columns = {name: pa.array([row.get(name) for row in answers], kind) for name, kind in ANSWER.items()}
    return {**columns, error_column: error_array(faults)}


def error_array(faults: Sequence[Fault | None]) -> Any:
    """The error column."""
    return pa.array([None if fault is None else asdict(fault) for fault in faults], ERROR_TYPE)


def failed(stage: str, error: Exception) -> Fault:
    """The fault of a row that the user's own function failed on."""
    return Fault(f"{stage}_failed", stage, f"{type(error).__name__}: {error}")
