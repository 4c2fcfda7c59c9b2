"""The stages around the engine, in tasks on any CPU: the user's preprocess, templates, tokenizing; his postprocess."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from shoal.driver.data.config import ProcessorConfig
from shoal.driver.data.rows import STATE, STATE_TYPE, error_array, failed, plain, table_of, table_rows, with_columns
from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.forms.base import RowRequest
from shoal.driver.jobs.forms.plain import PlainForm
from shoal.driver.jobs.keys import stream_number
from shoal.driver.jobs.model import RowModel
from shoal.driver.jobs.packed import pack_ids
from shoal.driver.jobs.prepare import Ready, RowPreparer

RowFunction = Callable[[dict[str, Any]], Mapping[str, Any]]
_kept: dict[str, Preparation] = {}  # in a task's process: what the last pipeline's tasks were made with


class Preparation:
    """Rows of a table made ready for an engine. For one thread."""

    def __init__(self, config: ProcessorConfig, model: RowModel, preprocess: RowFunction | None = None) -> None:
        self._form, self._preprocess = PlainForm(config), preprocess
        self._preparer = RowPreparer(model.tools(), config.sampling_params, config.chat_template_kwargs)

    def run(self, table: Any) -> Any:
        """The table with what preprocess added, and with the column STATE."""
        rows = list(table_rows(table))
        faults: list[Fault | None] = [None] * len(rows)
        if self._preprocess is not None and rows:
            rows = [self._preprocessed(place, row, faults) for place, row in enumerate(rows)]
            table = table_of(rows)
        streams: list[int] = []
        places: list[int] = []
        requests: list[RowRequest] = []
        for place, row in enumerate(rows):
            streams.append(secrets.randbits(64))
            if faults[place] is not None:
                continue
            try:
                columns = _given(row)
                row_id = self._form.row_id(columns)
                if row_id is not None:
                    streams[place] = stream_number(row_id)
                requests.append(self._form.request(columns))
                places.append(place)
            except RowError as error:
                faults[place] = error.fault
        ready: list[Ready | None] = [None] * len(rows)
        for place, found in zip(places, self._preparer.prepare(requests), strict=True):
            if isinstance(found, Fault):
                faults[place] = found
            else:
                ready[place] = found
        states = [_state(*state) for state in zip(ready, faults, streams, strict=True)]
        return with_columns(table, {STATE: pa.array(states, STATE_TYPE)})

    def _preprocessed(self, place: int, row: dict[str, Any], faults: list[Fault | None]) -> dict[str, Any]:
        assert self._preprocess is not None
        try:
            found = self._preprocess(dict(row))
            if not isinstance(found, Mapping):
                raise TypeError(f"preprocess must return a dict of columns, got {type(found).__name__}")
        except Exception as error:  # the user's code may raise anything
            faults[place] = failed("preprocess", error)
            return row
        return {**row, **found}


def _given(row: dict[str, Any]) -> dict[str, Any]:
    """Columns as plain Python; tables give each struct all fields that any row has, so a null is no value."""
    columns = {name: plain(value) for name, value in row.items()}
    for name, value in columns.items():
        if hasattr(value, "__dataclass_fields__"):
            columns[name] = value = {key: getattr(value, key) for key in value.__dataclass_fields__}
        if isinstance(value, dict):
            columns[name] = {key: item for key, item in value.items() if item is not None}
    return columns


def _state(ready: Ready | None, fault: Fault | None, stream: int) -> dict[str, Any]:
    if ready is None:
        assert fault is not None, "a row is ready or has a fault"
        return {"stream": stream, "fault": json.dumps(asdict(fault))}
    return {
        "token_ids": pack_ids(ready.token_ids),
        "prompt": ready.prompt,
        "sampling": ready.sampling,
        "stream": stream,
    }


def prepare(table: Any, name: str, reference: list[Any]) -> Any:
    """`reference`: to the arguments of Preparation, unpacked once in each process."""
    if name not in _kept:
        import ray

        _kept.clear()
        _kept[name] = Preparation(*ray.get(reference[0]))
    return _kept[name].run(table)


def postprocess(table: Any, function: RowFunction, error_column: str) -> Any:
    """`function` over answered rows; rows in error pass as they are."""
    if not table.num_rows:
        return table
    rows, faults = [], []
    for row in table_rows(table):
        fault = None if row[error_column] is None else Fault(**row[error_column])
        if fault is None:
            try:
                found = function(dict(row))
                if not isinstance(found, Mapping):
                    raise TypeError(f"postprocess must return a dict of columns, got {type(found).__name__}")
                row = dict(found)
            except Exception as error:  # the user's code may raise anything
                fault = failed("postprocess", error)
        rows.append({key: value for key, value in row.items() if key != error_column})
        faults.append(fault)
    return with_columns(table_of(rows), {error_column: error_array(faults)})


def new_name() -> str:
    """Of one pipeline."""
    return uuid.uuid4().hex
