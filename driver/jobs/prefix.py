"""The beginning of an input whose rows are all settled: a job that goes on does not read it again.

The ledger has the index of every settled row, and now and then a position: how many rows there are up to some byte of
some file. Both hold while the input files are the very same ones, as their versions tell; else every row is read again
and found by its key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.keys import HASH, Hashes, Int64, KeyTable, Numbers

POSITION = "at"


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two rows of the input."""

    index: int = 0  # rows before it, in all files
    file: int = 0  # number of its file
    line: int = 0  # of the last row before it
    offset: int = 0  # bytes of the file before it, where its format can be read from there

    def record(self) -> dict[str, Any]:
        """For the ledger."""
        return {"t": POSITION, "index": self.index, "file": self.file, "line": self.line, "offset": self.offset}


@dataclass(frozen=True)
class Prefix:
    """Rows 0 to `end.index`, all of them settled."""

    end: Position
    values: Int64  # of each row: location of its record << 1 | whether it is an error
    ids: KeyTable  # hashes of the rows' ids


class PrefixFinder:
    """Is told of the records of a ledger, in their order, by `recover`."""

    def __init__(self, since: int | None) -> None:
        """`since`: the epoch from which on records are of the input as it is now; None: no records are."""
        self._since = since
        self._values = Numbers()
        self._ids = np.zeros(0, HASH)
        self._positions: list[Position] = []

    def counts(self, epoch: int) -> bool:
        """Whether records of an epoch say anything about the input as it is now."""
        return self._since is not None and epoch >= self._since

    def position(self, meta: Mapping[str, Any]) -> None:
        """A position."""
        self._positions.append(Position(meta["index"], meta["file"], meta["line"], meta["offset"]))

    def settled(self, indices: Int64, values: Int64, ids: Hashes) -> None:
        """Settled rows; the last record of a row counts. `values`: as in Prefix; `ids`: hashes of the rows' ids."""
        if not len(indices):
            return
        self._values.fill(indices, values)
        missing = int(indices.max()) + 1 - len(self._ids)
        if missing > 0:  # by half, so that each is moved a few times in all
            self._ids = np.concatenate([self._ids, np.zeros(max(missing, len(self._ids) // 2), HASH)])
        self._ids[indices] = ids

    def find(self, keep_errors: bool) -> Prefix | None:
        """What need not be read; None where that is nothing."""
        values = self._values.slice(0, len(self._ids))
        open_ = np.flatnonzero((values < 0) if keep_errors else (values < 0) | (values & 1 == 1))
        settled = int(open_[0]) if len(open_) else len(values)
        before = [one for one in self._positions if one.index <= settled]
        end = max(before, key=lambda one: one.index, default=Position())
        if not end.index:
            return None
        ids = KeyTable(with_values=False)
        ids.extend(self._ids[: end.index].tobytes())
        return Prefix(end, values[: end.index], ids)


def versions(files: Sequence[InputFile]) -> list[str]:
    """What tells a file that was not touched: its time, size, node or tag, whatever its filesystem knows."""
    return [str(file.filesystem.ukey(file.path)) for file in files]
