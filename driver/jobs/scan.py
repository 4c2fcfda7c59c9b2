"""The input as one stream of rows with ids: reading, checks that need no model, duplicates. Validation reads it too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.forms.base import Form
from shoal.driver.jobs.keys import KeyTable, RowKeys, id_hash
from shoal.driver.jobs.sources.registry import SourceRow, columns_of, parse_object, read_rows

SHOWN = 20  # problems that a message lists
_PEEK = 100  # rows looked at for one that tells the form


@dataclass(slots=True)
class InputRow:
    """One row of the input: it has an index, an id and a key whatever its state."""

    index: int  # among all rows of the input, from 0
    file: str  # name of its file
    line: int
    raw: bytes
    row_id: str
    id_hash: bytes
    key: bytes
    fault: Fault | None = None

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.file}:{self.line}"

    @property
    def columns(self) -> dict[str, Any] | None:
        """What can be read of it."""
        return columns_of(self.raw)


class RowReader:
    """What can be said of a row by itself. Remembers nothing: rows may be read anywhere, in any order."""

    def __init__(self, form: Form, keys: RowKeys | None) -> None:
        """`keys`: None where rows need none."""
        self._form, self._keys = form, keys

    def read(self, index: int, file: str, source: SourceRow) -> tuple[InputRow, dict[str, Any]]:
        """The row, and its columns where it has no fault."""
        row_id, key, fault = "", b"", source.fault
        columns: dict[str, Any] = {}
        if fault is None:
            try:
                columns = parse_object(source.raw)
                own_id = self._form.row_id(columns)
                if own_id is not None:
                    row_id = own_id
                    key = b"" if self._keys is None else self._keys.content(source.raw)
                self._form.check(columns)
            except RowError as error:
                fault = error.fault
        if not row_id:
            row_id = f"{file}:{source.line}"
            key = b"" if self._keys is None else self._keys.place(file, source.line, source.raw)
        return InputRow(index, file, source.line, source.raw, row_id, id_hash(row_id), key, fault), columns


class Duplicates:
    """Finds ids that were there before. It must meet every row once, in order."""

    def __init__(self, keys: RowKeys | None, ids: KeyTable | None = None) -> None:
        """`keys`: as of the rows' reader; `ids`: hashes of ids that were there before the first row it meets."""
        self._keys = keys
        self._ids = KeyTable(with_values=False) if ids is None else ids

    def mark(self, rows: Sequence[InputRow]) -> None:
        """Gives rows whose id was there before their fault, and an id and a key by their place."""
        known = self._ids.find([row.id_hash for row in rows])
        here: set[bytes] = set()
        for row, place in zip(rows, known.tolist(), strict=True):
            if place < 0 and row.id_hash not in here:
                here.add(row.id_hash)
                self._ids.add(row.id_hash)
                continue
            message = f"the id {row.row_id!r} was there before: ids must be unique"
            row.fault = Fault("duplicate_id", "validate", message)
            row.row_id = f"{row.row_id}#{row.file}:{row.line}"
            if self._keys is not None:
                row.key = self._keys.place(row.file, row.line, row.raw)


class Scanner:
    """Turns raw rows into InputRows, in order. It remembers ids, so each raw row is given to it once."""

    def __init__(self, form: Form, keys: RowKeys | None = None) -> None:
        """`keys`: None where only what is wrong with rows is asked."""
        self._reader, self._duplicates = RowReader(form, keys), Duplicates(keys)

    def scan(self, rows: Sequence[tuple[int, InputFile, SourceRow]]) -> list[InputRow]:
        """A chunk of rows, each with what is wrong with it, if anything."""
        found = [self._reader.read(index, file.name, source)[0] for index, file, source in rows]
        self._duplicates.mark(found)
        return found


def raw_rows(files: Sequence[InputFile], max_line_bytes: int) -> Iterator[tuple[int, InputFile, SourceRow]]:
    """All raw rows of the files with their index."""
    index = itertools.count()
    for file in files:
        for source in read_rows(file, max_line_bytes):
            yield next(index), file, source


def detect_form(files: Sequence[InputFile], max_line_bytes: int) -> str:
    """openai where the first row that can be read has custom_id, url and body; else rows."""
    for _, _, source in itertools.islice(raw_rows(files, max_line_bytes), _PEEK):
        if source.fault is not None:
            continue
        try:
            columns = parse_object(source.raw)
        except RowError:
            continue
        return "openai" if {"custom_id", "url", "body"} <= columns.keys() else "rows"
    return "rows"


@dataclass(slots=True)
class Validation:
    """What reading the first rows found."""

    num_rows: int = 0
    complete: bool = True  # there are no rows beyond those
    num_faults: int = 0
    by_code: dict[str, int] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {code}" for code, count in sorted(self.by_code.items()))
        hidden = self.num_faults - len(self.shown)
        lines = [f"{self.num_faults} of {self.num_rows} rows cannot be used ({counts}):", *self.shown]
        return "\n  ".join(lines + ([f"and {hidden} more"] if hidden else []))


def validate(
    files: Sequence[InputFile],
    scanner: Scanner,
    limit: int,
    max_line_bytes: int,
    give_up: Callable[[], bool] = lambda: False,
) -> Validation:
    """Reads up to `limit` rows and counts what is wrong with them. `give_up` is asked now and then."""
    result = Validation()
    rows = raw_rows(files, max_line_bytes)
    while not give_up() and (chunk := list(itertools.islice(rows, min(1024, limit - result.num_rows)))):
        result.num_rows += len(chunk)
        for row in scanner.scan(chunk):
            if row.fault is not None:
                result.num_faults += 1
                result.by_code[row.fault.code] = result.by_code.get(row.fault.code, 0) + 1
                if len(result.shown) < SHOWN:
                    result.shown.append(f"{row.place}: {row.fault.message}")
    result.complete = next(rows, None) is None
    return result
