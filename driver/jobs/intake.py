"""Rows from the pipeline to work for engines: numbers them, finds duplicates, leaves out what is done.

Runs in a thread of its own, a few chunks ahead of the engines and no more.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from shoal.driver.binding import Row
from shoal.driver.dispatch import Tries
from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.keys import KeyTable, stream_number
from shoal.driver.jobs.model import ModelTools
from shoal.driver.jobs.packed import PackedRow, rows_of, unpack_ids
from shoal.driver.jobs.prefix import Position, Prefix
from shoal.driver.jobs.prepare import BoundSet
from shoal.driver.jobs.scan import Duplicates, InputRow
from shoal.driver.jobs.work import Chunk, Known, Settled, Work

CHUNK_ROWS = 256


@dataclass(slots=True)
class Scanned:
    """Consecutive rows of the input: those that are settled, and those that need an engine."""

    end: Position  # after them
    known: Known | None = None
    settled: list[Settled] = field(default_factory=list)
    needy: list[PackedRow] = field(default_factory=list)


class Intake:
    """The input as chunks, in order. For one thread."""

    def __init__(
        self,
        tables: Callable[[], Generator[Any, None, None]],
        names: Sequence[str],
        duplicates: Duplicates,
        done: KeyTable,
        tries: dict[bytes, Tries],
        tools: Future[ModelTools],
        prefix: Prefix | None = None,
    ) -> None:
        """`tables`: begins the pipeline, after the rows of `prefix`. `names`: of the input files.

        `done`: location in the ledger of rows that need nothing; `tries`: of rows that were in an engine that died.
        `tools` is waited for when the first row comes that needs an engine, not before.
        """
        self._tables, self._names, self._duplicates = tables, names, duplicates
        self._done, self._tries, self._tools, self._prefix = done, tries, tools, prefix
        self._bounds: BoundSet | None = None

    def scanned(self) -> Generator[Scanned, None, None]:
        """Chunks, one after the other."""
        index = 0 if self._prefix is None else self._prefix.end.index
        with contextlib.closing(self._tables()) as tables, ThreadPoolExecutor(1) as starter:
            first = starter.submit(next, tables, None)  # tasks start while rows that need none are told of
            if self._prefix is not None:
                known, self._prefix = self._prefix.values, None  # it may be large
                yield Scanned(Position(), Known(known))
            for table in itertools.chain([] if first.result() is None else [first.result()], tables):
                yield from self._scanned_of(table, index)
                index += table.num_rows

    def _scanned_of(self, table: Any, index: int) -> Iterator[Scanned]:
        packed = rows_of(table, index, self._names)
        self._duplicates.mark([one.row for one in packed])
        locations = self._done.find([one.row.key for one in packed]).tolist()
        for start in range(0, len(packed), CHUNK_ROWS):
            yield self._sort(packed[start : start + CHUNK_ROWS], locations[start : start + CHUNK_ROWS])

    def _sort(self, packed: list[PackedRow], locations: list[int]) -> Scanned:
        last = packed[-1]
        settled: list[Settled] = []
        needy: list[PackedRow] = []
        for one, location in zip(packed, locations, strict=True):
            if location >= 0:
                settled.append(Settled(one.row.index, location))
            elif one.row.fault is not None:
                settled.append(_failed(one.row, one.row.fault))
            else:
                needy.append(one)
        return Scanned(Position(last.row.index + 1, last.file, last.row.line, last.end), None, settled, needy)

    def chunk(self, scanned: Scanned) -> Chunk:
        """The chunk, its rows ready for an engine. Waits for the model where any row needs it."""
        num_rows = len(scanned.settled) + len(scanned.needy) + (len(scanned.known.values) if scanned.known else 0)
        result = Chunk(num_rows, scanned.end, scanned.known, settled=scanned.settled)
        if not scanned.needy:
            return result
        tools = self._tools.result()
        if self._bounds is None:
            self._bounds = BoundSet(tools)
        for one in scanned.needy:
            assert one.token_ids is not None, "a row that is not done and has no fault was made ready"
            assert one.sampling is not None
            row, ids = one.row, unpack_ids(one.token_ids)
            bound = self._bounds.find(one.sampling.decode("utf-8", "surrogatepass"))
            ready = Row(row.index, stream_number(row.row_id), 0, None, ids, bound)
            try:
                tools.inputs.check_length(ids)  # an engine may take less than the model would
                tools.binder.check_length(ready)
            except ValueError as error:
                code = "invalid_prompt" if len(ids) >= tools.inputs.max_model_len else "invalid_parameter"
                stage = "tokenize" if code == "invalid_prompt" else "parameters"
                result.settled.append(_failed(row, Fault(code, stage, str(error))))
                continue
            work = Work(row.index, row.row_id, row.key, row.raw, ready)
            if row.key in self._tries:
                work.tries = self._tries.pop(row.key)
            result.work.append(work)
        return result


def _failed(row: InputRow, fault: Fault) -> Settled:
    return Settled(row.index, -1, row.row_id, row.key, row.raw, fault)
