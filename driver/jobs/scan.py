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
from shoal.driver.jobs.sources.registry import SourceRow, read_rows

SHOWN = 20  # problems that a message lists
_PEEK = 100  # rows looked at for one that tells the form


@dataclass(slots=True)
class InputRow:
    """One row of the input: it has an index, an id and a key whatever its state."""

    index: int  # among all rows of the input, from 0
    file: InputFile
    line: int
    row_id: str
    key: bytes
    columns: dict[str, Any] | None  # None: it could not be read
    fault: Fault | None = None

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.file.name}:{self.line}"


class Scanner:
    """Turns raw rows into InputRows, in order. It remembers ids, so each raw row is given to it once."""

    def __init__(self, form: Form, keys: RowKeys) -> None:
        self._form, self._keys = form, keys
        self._ids = KeyTable(with_values=False)

    def scan(self, rows: Sequence[tuple[int, InputFile, SourceRow]]) -> list[InputRow]:
        """A chunk of rows, each with what is wrong with it, if anything."""
        found = [self._read(index, file, source) for index, file, source in rows]
        self._find_duplicates(found, [source.raw for _, _, source in rows])
        return found

    def _read(self, index: int, file: InputFile, source: SourceRow) -> InputRow:
        made_id = f"{file.name}:{source.line}"
        row = InputRow(index, file, source.line, made_id, b"", None, source.fault)
        if row.fault is None:
            try:
                row.columns = source.columns()
                own_id = self._form.row_id(row.columns)
                if own_id is not None:
                    row.row_id, row.key = own_id, self._keys.content(source.raw)
                self._form.check(row.columns)
            except RowError as error:
                row.fault = error.fault
        if not row.key:
            row.key = self._keys.place(file.name, source.line, source.raw)
        return row

    def _find_duplicates(self, rows: list[InputRow], raws: list[bytes]) -> None:
        hashes = [id_hash(row.row_id) for row in rows]
        known = self._ids.find(hashes)
        here: set[bytes] = set()
        for row, raw, digest, place in zip(rows, raws, hashes, known, strict=True):
            if place < 0 and digest not in here:
                here.add(digest)
                self._ids.add(digest)
                continue
            message = f"the id {row.row_id!r} was there before: ids must be unique"
            row.fault = Fault("duplicate_id", "validate", message)
            row.row_id = f"{row.row_id}#{row.file.name}:{row.line}"
            row.key = self._keys.place(row.file.name, row.line, raw)


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
            columns = source.columns()
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
