"""Parquet: one schema for all rows, known only once all were seen; until then they wait in a temporary file."""

from __future__ import annotations

import itertools
import json
import tempfile
from typing import IO, Any

_GROUP_ROWS = 4096
_ERROR_FIELDS = ("code", "stage", "message")


class ParquetSink:
    """Row groups of a few thousand rows; columns are those that any row has."""

    def __init__(self, stream: IO[bytes]) -> None:
        import pyarrow

        self._stream = stream
        # On disk: a job's output may be larger than its memory.
        self._waiting = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by finish
        self._group: list[dict[str, Any]] = []
        error = pyarrow.struct([(name, pyarrow.string()) for name in _ERROR_FIELDS])
        self._schema: Any = pyarrow.schema([("generated_text", pyarrow.string()), ("error", error)])

    def write(self, row: bytes) -> None:
        """Adds a row. ValueError where a column has values of kinds that do not go together."""
        self._waiting.write(row + b"\n")
        self._group.append(json.loads(row))
        if len(self._group) == _GROUP_ROWS:
            self._learn()

    def _learn(self) -> None:
        import pyarrow

        names = dict.fromkeys(name for row in self._group for name in row)
        try:
            found = pyarrow.table({name: [row.get(name) for row in self._group] for name in names}).schema
            self._schema = pyarrow.unify_schemas([self._schema, found], promote_options="permissive")
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(
                f"the rows do not fit one Parquet schema: {error}. Write JSONL, or name the columns to keep (columns)"
            ) from None
        self._group = []

    def finish(self) -> None:
        """Writes everything with the schema of all rows."""
        import pyarrow
        import pyarrow.parquet

        self._learn()
        as_text = {field.name for field in self._schema if _has_empty_struct(field.type)}
        fields = [
            pyarrow.field(f.name, pyarrow.string() if f.name in as_text else _known(f.type)) for f in self._schema
        ]
        schema = pyarrow.schema(fields)
        self._waiting.seek(0)
        with pyarrow.parquet.ParquetWriter(self._stream, schema, compression="zstd") as writer:
            while lines := list(itertools.islice(self._waiting, _GROUP_ROWS)):
                rows = [_texts(json.loads(line), as_text) for line in lines]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
        self._waiting.close()


def _texts(row: dict[str, Any], names: set[str]) -> dict[str, Any]:
    for name in names:
        if row.get(name) is not None:
            row[name] = json.dumps(row[name], ensure_ascii=False)
    return row


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
