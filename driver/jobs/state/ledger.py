"""The ledger: what became of each row. One process at a time writes it; a newer one takes over and shuts it out.

A record is a line: crc32, a JSON object about the record, a tab, and the row of the output as JSON (no JSON text has a
raw tab in it). Each process that takes over claims the next epoch, reads what the epochs before it left up to the last
whole line, and seals them at that length before it writes: what a process that was thought dead appends later is not
part of the ledger, and that process stops when it sees the newer epoch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from shoal.driver.jobs.json_text import dump, load_all
from shoal.driver.jobs.keys import Int64
from shoal.driver.jobs.state.digest import DigestWriter, read_digests
from shoal.driver.jobs.state.records import ERROR, Records
from shoal.driver.jobs.state.store import StateStore, epoch_of, seal_name

_OFFSET_BITS = 40
_ERROR_MARK = b'{"t":"%s"' % ERROR.encode()
_CRC_CHARS = 9  # eight digits and a space
_TAIL_BYTES = 1 << 20


class SupersededError(RuntimeError):
    """A newer process has taken the job over; this one must write nothing more."""


class Ledger:
    """The committer's ledger. For one thread."""

    def __init__(self, store: StateStore, *, fresh: bool = False) -> None:
        """Takes over: claims the next epoch and seals those before it, at nothing where `fresh`."""
        self._store = store
        self.epoch = _claim_next(store)
        sealed: dict[str, int] = {} if fresh else _seal_older(store, self.epoch)
        seal = {"epoch": self.epoch, "parts": sealed}
        store.put(seal_name(self.epoch), json.dumps(seal).encode())
        there = store.names()
        self.num_torn_bytes = sum(there[name] - size for name, size in sealed.items())
        self._sealed = sealed
        self._parts = list(sealed)
        self._places = {name: number for number, name in enumerate(self._parts)}
        if fresh:
            older = [epoch for epoch in store.epochs() if epoch < self.epoch]
            store.discard([name for epoch in older for name in (*store.parts(epoch), *store.digests(epoch))])
        self._writer = store.writer(self.epoch)
        self._digests = DigestWriter(store, self.epoch) if store.appends else None
        self._end = 0  # of the last record, in its part
        self.num_unsynced = 0

    def records(self) -> Iterator[Records]:
        """All records of the epochs before this one, many at a time: a resumed job waits for each of them."""
        for name, size in self._sealed.items():
            base, epoch = self._places[name] << _OFFSET_BITS, epoch_of(name)
            assert epoch is not None
            at = 0
            for digest in read_digests(self._store, epoch, size) if self._store.appends else ():
                yield from self._parsed(name, epoch, at, digest.start)
                digest.records.rows["value"] += base << 1
                yield digest.records
                at = digest.end
            yield from self._parsed(name, epoch, at, size)

    def _parsed(self, name: str, epoch: int, start: int, end: int) -> Iterator[Records]:
        """Records of the lines from one byte of a part to another."""
        base = self._places[name] << _OFFSET_BITS
        for offset, lines in _lines(self._store, name, end, start):
            bodies, locations, at = [], [], base | offset
            for line in lines:
                if check(line):
                    bodies.append(line[_CRC_CHARS : line.index(b"\t")])
                    locations.append(at)
                at += len(line) + 1
            if bodies:
                yield Records.of(epoch, load_all(bodies), locations)

    def append(self, meta: dict[str, Any], row: bytes = b"") -> int:
        """Takes a record, which is durable after `sync`; its location. `meta` begins with its type, "t"."""
        line = encode(meta, row)
        name, offset = self._writer.append(line)
        self._end = offset + len(line)
        if self._digests is not None:
            self._digests.add(meta, offset)
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = len(self._parts)
            self._parts.append(name)
        self.num_unsynced += 1
        return place << _OFFSET_BITS | offset

    def sync(self, force: bool = True) -> None:
        """Makes what was appended durable.

        SupersededError: a newer process has the job, and what was not durable before is not part of the ledger.
        LedgerFullError: no room; nothing is lost, and `sync` may be called again.
        """
        if self._writer.sync(force):
            self.num_unsynced = 0
            self.check_owner()
            if self._digests is not None:
                self._digests.synced(self._end)

    def check_owner(self) -> None:
        """Raises SupersededError where a newer process has taken over."""
        if self._store.is_claimed(self.epoch + 1):
            raise SupersededError(f"a newer run has taken this job over (epoch {self.epoch + 1} after {self.epoch})")

    def fingerprint(self, locations: Int64) -> str:
        """A digest of which records these are, in their order, the same in every run: runs number the ledger's parts
        each in their own way, but no two parts of a job ever have one name."""
        there = locations[locations >= 0]
        numbers, place = np.unique(there >> _OFFSET_BITS, return_inverse=True)
        found = hashlib.blake2b(json.dumps([self._parts[number] for number in numbers]).encode(), digest_size=16)
        found.update((place << _OFFSET_BITS | there & ((1 << _OFFSET_BITS) - 1)).astype("<i8").tobytes())
        return found.hexdigest()

    def row(self, location: int) -> tuple[bool, bytes]:
        """Whether the record at a location is an error, and its row. It must be durable."""
        name = self._parts[location >> _OFFSET_BITS]
        line = self._store.record(name, location & ((1 << _OFFSET_BITS) - 1))
        assert check(line), f"{name} has a broken record at {location & ((1 << _OFFSET_BITS) - 1)}"
        return line.startswith(_ERROR_MARK, _CRC_CHARS), line[line.index(b"\t") + 1 :]

    def close(self) -> None:
        """Frees the files; what was not synced is gone."""
        self._writer.close()


def encode(meta: dict[str, Any], row: bytes) -> bytes:
    """The line of a record."""
    body = dump(meta) + b"\t" + row
    return b"%08x %s\n" % (zlib.crc32(body), body)


def check(line: bytes) -> bool:
    """Whether a line is whole."""
    return line[:_CRC_CHARS] == b"%08x " % zlib.crc32(line[_CRC_CHARS:])


def _claim_next(store: StateStore) -> int:
    epoch = max(store.epochs(), default=0) + 1
    while True:
        try:
            store.claim(epoch)
        except FileExistsError:
            epoch += 1
        else:
            return epoch


def _seal_older(store: StateStore, epoch: int) -> dict[str, int]:
    """Part and length of all that counts of the epochs before: as sealed before, the rest up to its last whole line."""
    there = store.names()
    done = max((older for older in range(1, epoch) if seal_name(older) in there), default=0)
    found = store.get(seal_name(done)) if done else None
    sealed: dict[str, int] = {} if found is None else dict(json.loads(found)["parts"])
    for newer in store.epochs():
        if max(done, 1) <= newer < epoch:
            sealed |= {name: _whole_length(store, name, size) for name, size in store.parts(newer).items()}
    return sealed


def _whole_length(store: StateStore, name: str, size: int) -> int:
    """Bytes up to the end of the last whole line; only the part's end is read, unless there is none in it."""
    for window in (_TAIL_BYTES, size):
        start = max(0, size - window)
        length = 0
        for offset, lines in _lines(store, name, size, start):  # the first one is cut, and fails its check
            for line in lines:
                offset += len(line) + 1
                if check(line):
                    length = offset
        if length or not start:
            return length
    return 0


def _lines(store: StateStore, name: str, size: int, start: int = 0) -> Iterator[tuple[int, list[bytes]]]:
    """Lines that end, without their ends, and the offset of the first; from `start` on, be it in the middle of one."""
    offset, rest = start, b""
    for chunk in store.chunks(name, size, start):
        data = rest + chunk
        lines = data.split(b"\n")
        rest = lines.pop()
        yield offset, lines
        offset += len(data) - len(rest)
