"""Row keys, and tables of millions of them: 96-bit hashes in sorted numpy arrays, 12 bytes each and 8 for a value."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

KEY_BYTES = 12
HASH = np.dtype((np.void, KEY_BYTES))
MISSING = np.int64(-1)
_PENDING = 1 << 14  # keys kept in a dict before they become a sorted run
_KEY = np.dtype([("high", "<u8"), ("low", "<u4")])

UInt64 = npt.NDArray[np.uint64]
UInt32 = npt.NDArray[np.uint32]
Int64 = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.void]  # of HASH


class RowKeys:
    """Keys of one job's rows. Everything that the answer depends on is in them: the row, and the job's `salt`."""

    def __init__(self, salt: bytes) -> None:
        self._content = blake2b(b"content" + salt, digest_size=KEY_BYTES)
        self._place = blake2b(b"place" + salt, digest_size=KEY_BYTES)

    def content(self, raw: bytes) -> bytes:
        """Of a row that has its own unique id: the same wherever the row stands in the input."""
        digest = self._content.copy()
        digest.update(raw)
        return digest.digest()

    def place(self, file: str, line: int, raw: bytes) -> bytes:
        """Of any other row (no id, an id that was there before, a line that cannot be read): bound to its place."""
        digest = self._place.copy()
        digest.update(f"{file}\0{line}\0".encode())
        digest.update(raw)
        return digest.digest()


def id_hash(row_id: str) -> bytes:
    """The key of an id among ids."""
    return blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def stream_number(row_id: str) -> int:
    """The key of a row's random streams, unsigned 64 bits: its id's, so that a resumed job draws the same."""
    return int.from_bytes(blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _Run:
    """Sorted keys and their values."""

    __slots__ = ("high", "low", "values")

    def __init__(self, high: UInt64, low: UInt32, values: Int64 | None) -> None:
        self.high, self.low, self.values = high, low, values

    def __len__(self) -> int:
        return len(self.high)

    def places(self, high: UInt64, low: UInt32) -> Int64:
        """Index of each key, -1 where it is not here."""
        at = np.searchsorted(self.high, high).astype(np.int64)
        found = np.full(len(high), MISSING)
        open_ = np.flatnonzero(at < len(self))
        while len(open_):  # more than one round only where two keys share their first 64 bits
            here = at[open_]
            same = self.high[here] == high[open_]
            hit = same & (self.low[here] == low[open_])
            found[open_[hit]] = here[hit]
            open_ = open_[same & ~hit]
            at[open_] += 1
            open_ = open_[at[open_] < len(self)]
        return found


class KeyTable:
    """Keys of 12 bytes to whole numbers of 0 and up. A key is added once; lookups are made many at a time."""

    def __init__(self, with_values: bool) -> None:
        self._with_values = with_values
        self._pending: dict[bytes, int] = {}
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return len(self._pending) + sum(map(len, self._runs))

    @property
    def nbytes(self) -> int:
        """Bytes held in sorted runs."""
        return sum(r.high.nbytes + r.low.nbytes + (0 if r.values is None else r.values.nbytes) for r in self._runs)

    def add(self, key: bytes, value: int = 0) -> None:
        """Adds a key that is not in the table."""
        self._pending[key] = value
        if len(self._pending) >= _PENDING:
            self._flush()

    def extend(self, keys: bytes, values: Sequence[int] | Int64 = ()) -> None:
        """Adds many keys, one after the other in `keys`; values where the table has some."""
        high, low = _split([keys])
        assert len(values) == (len(high) if self._with_values else 0)
        self._insert(_sorted(high, low, np.array(values, np.int64) if self._with_values else None))

    def find(self, keys: Sequence[bytes]) -> Int64:
        """Value of each key (0 in a table without values), -1 where it is missing."""
        found = np.fromiter((self._pending.get(key, -1) for key in keys), np.int64, len(keys))
        if not self._runs or not len(keys):
            return found
        high, low = _split(keys)
        for run in self._runs:
            places = run.places(high, low)
            hits = np.flatnonzero(places >= 0)
            found[hits] = 0 if run.values is None else run.values[places[hits]]
        return found

    def keys_only(self) -> KeyTable:
        """A table of the same keys, without values; it shares memory with this one and is not to be added to."""
        table = KeyTable(with_values=False)
        table._pending = dict.fromkeys(self._pending, 0)
        table._runs = [_Run(run.high, run.low, None) for run in self._runs]
        return table

    def _flush(self) -> None:
        high, low = _split(list(self._pending))
        values = np.fromiter(self._pending.values(), np.int64, len(high)) if self._with_values else None
        self._pending.clear()
        self._insert(_sorted(high, low, values))

    def _insert(self, run: _Run) -> None:
        # Runs grow by at least half: each key is moved a few times in all, and there are few runs to look into.
        while self._runs and 2 * len(run) >= len(self._runs[-1]):
            run = _merged(self._runs.pop(), run)
        self._runs.append(run)


def _split(keys: Sequence[bytes]) -> tuple[UInt64, UInt32]:
    both = np.frombuffer(b"".join(keys), _KEY)
    return np.ascontiguousarray(both["high"]), np.ascontiguousarray(both["low"])


def _sorted(high: UInt64, low: UInt32, values: Int64 | None) -> _Run:
    order = np.argsort(high, kind="stable")
    return _Run(high[order], low[order], None if values is None else values[order])


def _merged(one: _Run, two: _Run) -> _Run:
    """Of two sorted runs one, without sorting them together: that would take several times the memory for a moment."""
    places = np.searchsorted(one.high, two.high, side="right")
    values = None
    if one.values is not None and two.values is not None:
        values = np.insert(one.values, places, two.values)
    return _Run(np.insert(one.high, places, two.high), np.insert(one.low, places, two.low), values)


class Numbers:
    """A number of 0 and up for each row, 8 bytes each, -1 where there is none yet; grows by pieces, without copying."""

    _PIECE = 1 << 16

    def __init__(self) -> None:
        self._pieces: list[Int64] = []

    def __getitem__(self, index: int) -> int:
        piece, place = divmod(index, self._PIECE)
        return int(self._pieces[piece][place]) if piece < len(self._pieces) else -1

    def __setitem__(self, index: int, value: int) -> None:
        piece, place = divmod(index, self._PIECE)
        while piece >= len(self._pieces):
            self._pieces.append(np.full(self._PIECE, MISSING))
        self._pieces[piece][place] = value

    def fill(self, indices: Sequence[int] | Int64, values: Sequence[int] | Int64) -> None:
        """Sets many; of several values for one index the last one stays."""
        places, found = np.array(indices, np.int64), np.array(values, np.int64)
        pieces = places // self._PIECE
        for piece in np.unique(pieces).tolist():
            while piece >= len(self._pieces):
                self._pieces.append(np.full(self._PIECE, MISSING))
            here = pieces == piece
            self._pieces[piece][places[here] % self._PIECE] = found[here]

    def slice(self, start: int, stop: int) -> Int64:
        """The numbers of rows start to stop."""
        first, last = start // self._PIECE, -(-stop // self._PIECE)
        pieces = self._pieces[first:last] + [np.full(self._PIECE, MISSING)] * (last - max(first, len(self._pieces)))
        if not pieces:
            return np.empty(0, np.int64)
        base = first * self._PIECE
        return np.concatenate(pieces)[start - base : stop - base]
