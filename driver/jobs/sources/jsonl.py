"""JSONL: one object a line. Lines are read with a limit, so that a broken file costs no memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.sources.registry import SourceRow

_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_rows(file: InputFile, max_line_bytes: int) -> Iterator[SourceRow]:
    """Rows of a JSONL file. Blank lines at its end are no rows; before that they are faults."""
    with file.open() as opened:
        stream = io.BufferedReader(opened, _BUFFER) if not isinstance(opened, io.BufferedReader) else opened  # type: ignore[type-var]
        blanks: list[int] = []
        for number, line in _lines(stream, max_line_bytes):
            if line is not None and not line.strip():
                blanks.append(number)
                continue
            for blank in blanks:
                yield SourceRow(blank, b"", fault=Fault("blank_line", "read", "the line is blank"))
            blanks.clear()
            if line is None:
                message = f"the line is longer than {max_line_bytes} bytes (max_line_bytes)"
                yield SourceRow(number, b"", fault=Fault("line_too_long", "read", message))
            else:
                yield SourceRow(number, line)


def _lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line; None for one beyond the limit, which is skipped piece by piece."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if number == 1 and line.startswith(_BOM):
            line = line[len(_BOM) :]
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := stream.readline(_BUFFER)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.rstrip(b"\r\n")
