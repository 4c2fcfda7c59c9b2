"""JSONL: one object a line. Lines are read with a limit, so that a broken file costs no memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.sources.registry import SourceRow, Start

_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_rows(file: InputFile, max_line_bytes: int, start: Start) -> Iterator[SourceRow]:
    """Rows of a JSONL file. Blank lines at its end are no rows; before that they are faults."""
    with file.open() as opened:
        stream = io.BufferedReader(opened, _BUFFER) if not isinstance(opened, io.BufferedReader) else opened  # type: ignore[type-var]
        _skip(stream, start.offset)
        blanks: list[SourceRow] = []
        for number, line, end in _lines(stream, max_line_bytes, start):
            if line is not None and not line.strip():
                blanks.append(SourceRow(number, b"", Fault("blank_line", "read", "the line is blank"), end))
                continue
            yield from blanks
            blanks.clear()
            if line is None:
                message = f"the line is longer than {max_line_bytes} bytes (max_line_bytes)"
                yield SourceRow(number, b"", Fault("line_too_long", "read", message), end)
            else:
                yield SourceRow(number, line, None, end)


def _skip(stream: IO[bytes], left: int) -> None:
    if left and stream.seekable():
        stream.seek(left)
        return
    while left and (data := stream.read(min(left, _BUFFER))):
        left -= len(data)


def _lines(stream: IO[bytes], limit: int, start: Start) -> Iterator[tuple[int, bytes | None, int]]:
    """Number, bytes and end of each line; no bytes of one beyond the limit, which is skipped piece by piece."""
    number, end = start.line, start.offset
    while line := stream.readline(limit + 1):
        number += 1
        end += len(line)
        if number == 1 and line.startswith(_BOM):
            line = line[len(_BOM) :]
        if len(line) > limit and not line.endswith(b"\n"):
            while rest := stream.readline(_BUFFER):
                end += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield number, None, end
        else:
            yield number, line.rstrip(b"\r\n"), end
