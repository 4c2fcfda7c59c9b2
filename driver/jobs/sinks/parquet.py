"""Parquet: one schema for all rows, known only once all were seen; until then they wait in a temporary file."""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
from typing import IO, Any

from shoal.driver.log import LOGGER

_GROUP_ROWS = 4096
_ERROR_FIELDS = ("code", "stage", "message")
_UNFIT = (TypeError, ValueError, OverflowError, NotImplementedError)  # what Arrow raises for values of no one type
_SURROGATES = re.compile("[\ud800-\udfff]")


class ParquetSink:
    """Row groups of a few thousand rows; columns are those that any row has, as JSON text where no type fits all."""

    def __init__(self, stream: IO[bytes]) -> None:
        import pyarrow

        self._stream = stream
        # On disk: a job's output may be larger than its memory.
        self._waiting = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by finish
        self._group: list[dict[str, Any]] = []
        error = pyarrow.struct([(name, pyarrow.string()) for name in _ERROR_FIELDS])
        self._types: dict[str, Any] = {"generated_text": pyarrow.string(), "error": error}
        self._as_text: set[str] = set()  # columns that are written as JSON text

    def write(self, row: bytes) -> None:
        """Adds a row."""
        self._waiting.write(row + b"\n")
        self._group.append(_columns(row))
        if len(self._group) == _GROUP_ROWS:
            self._learn()

    def _learn(self) -> None:
        import pyarrow

        for name in dict.fromkeys(name for row in self._group for name in row):
            if name in self._as_text:
                continue
            values = [row.get(name) for row in self._group]
            try:
                found = pyarrow.array(values).type
                if pyarrow.types.is_floating(found) and any(isinstance(value, bool) for value in values):
                    raise TypeError("Arrow makes 1.0 of a true that comes after a fraction")
                self._types[name] = _unified(self._types.get(name, pyarrow.null()), found)
            except _UNFIT:
                self._give_up_type(name)
        self._group = []

    def _give_up_type(self, name: str) -> None:
        import pyarrow

        self._types[name] = pyarrow.string()
        self._as_text.add(name)
        _warn(name)

    def finish(self) -> None:
        """Writes everything with the schema of all rows."""
        import pyarrow

        self._learn()
        for name, kind in self._types.items():
            if _has_empty_struct(kind):
                self._as_text.add(name)
            self._types[name] = pyarrow.string() if name in self._as_text else _known(kind)
        while (unfit := self._write_all()) is not None:
            self._give_up_type(unfit)
        self._waiting.close()

    def _write_all(self) -> str | None:
        """Writes the file from its beginning, up to a column with a value that its type cannot hold; that column.

        Groups do not show it while they are learned: one has whole numbers beyond 2**53, another has fractions.
        """
        import pyarrow
        import pyarrow.parquet

        for file in (self._waiting, self._stream):
            file.seek(0)
        self._stream.truncate()
        schema = pyarrow.schema(list(self._types.items()))
        with pyarrow.parquet.ParquetWriter(self._stream, schema, compression="zstd") as writer:
            while lines := list(itertools.islice(self._waiting, _GROUP_ROWS)):
                rows = [_columns(line) for line in lines]
                arrays = []
                for name, kind in self._types.items():
                    values = [row.get(name) for row in rows]
                    try:
                        arrays.append(pyarrow.array(_texts(values) if name in self._as_text else values, kind))
                    except _UNFIT:
                        return name
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
        return None


def _columns(row: bytes) -> dict[str, Any]:
    """Of a row as JSON text. Parquet's strings are Unicode: what is none in them (lone surrogates) becomes U+FFFD."""
    found: dict[str, Any] = json.loads(row)
    if b"\\ud" in row:  # only escapes can hold one
        found = json.loads(_SURROGATES.sub("\ufffd", json.dumps(found, ensure_ascii=False)))
    return found


def _texts(values: list[Any]) -> list[str | None]:
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]


def _unified(one: Any, two: Any) -> Any:
    """A type for values of both. Raises what Arrow raises where there is none."""
    import pyarrow

    schemas = [pyarrow.schema([("values", kind)]) for kind in (one, two)]
    return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type


@functools.cache
def _warn(name: str) -> None:
    """Once for a column, however many parts it is in."""
    LOGGER.warning("no Parquet type holds all values of column %r: they are written as JSON text", name)


def _has_empty_struct(kind: Any) -> bool:
    """Parquet cannot hold objects without fields: such a column is written as JSON text."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return not kind.num_fields or any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pyarrow.types.is_list(kind)) and _has_empty_struct(kind.value_type)


def _known(kind: Any) -> Any:
    """Where all values are null their type is not known, and few readers take columns of type null: text."""
    import pyarrow

    if pyarrow.types.is_null(kind):
        return pyarrow.string()
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([(kind.field(i).name, _known(kind.field(i).type)) for i in range(kind.num_fields)])
    return pyarrow.list_(_known(kind.value_type)) if pyarrow.types.is_list(kind) else kind
