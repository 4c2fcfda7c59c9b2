"""Digests: of some bytes of a ledger's part, what their lines say, for a recovery that need not read them.

A digest is a file beside the part: crc32, 4 bytes, and a numpy archive of `rows` (records.ROW, with values that count
from the part's begin) and `about` (JSON: `start` and `end` in bytes, and the other fields of Records). It is written
once those bytes are durable, and holds nothing that the lines do not: without it they are read.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.driver.jobs.accounts import Answered
from shoal.driver.jobs.state.records import ROW, Records
from shoal.driver.jobs.state.store import NO_ROOM, StateStore, digest_name
from shoal.driver.log import LOGGER

_RECORDS = 1 << 16  # in a digest: 2.6 MB, and what a recovery has to read line by line at the part's end
_AT_ONCE = 1 << 12  # records that wait as objects before they become columns
_CRC_BYTES = 4


@dataclass(slots=True)
class Digest:
    """What a digest says of the bytes `start` to `end` of its part."""

    start: int
    end: int
    records: Records


class DigestWriter:
    """Hears of all records of the one part of an epoch, in their order."""

    def __init__(self, store: StateStore, epoch: int) -> None:
        self._store, self._epoch = store, epoch
        self._number = self._start = 0
        self._metas: list[dict[str, Any]] = []
        self._offsets: list[int] = []
        self._pieces: list[Records] = []

    def add(self, meta: dict[str, Any], offset: int) -> None:
        """A record that was appended."""
        self._metas.append(meta)
        self._offsets.append(offset)
        if len(self._metas) >= _AT_ONCE:
            self._to_columns()

    def synced(self, end: int) -> None:
        """The part is durable up to `end`, the end of the last record: writes a digest if there is enough for one."""
        if len(self._pieces) * _AT_ONCE < _RECORDS:
            return
        self._to_columns()
        records, start = Records.join(self._pieces), self._start
        self._pieces.clear()
        self._start = end
        try:
            self._store.put(digest_name(self._epoch, self._number), _pack(Digest(start, end, records)))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            LOGGER.warning("no room for a digest of the ledger: a job that resumes will take longer to begin")
        self._number += 1

    def _to_columns(self) -> None:
        self._pieces.append(Records.of(self._epoch, self._metas, self._offsets))
        self._metas, self._offsets = [], []


def read_digests(store: StateStore, epoch: int, size: int) -> Iterator[Digest]:
    """An epoch's digests of the first `size` bytes of its part, in their order; broken ones are left out."""
    for name in store.digests(epoch):
        data = store.get(name)
        assert data is not None, f"{name} is gone"
        try:
            digest = _unpack(data, epoch)
        except ValueError as error:
            LOGGER.warning("%s %s: the ledger's lines are read instead", name, error)
            continue
        if digest.end <= size:
            yield digest


def _pack(digest: Digest) -> bytes:
    records = digest.records
    about = {"start": digest.start, "end": digest.end, "codes": records.codes, "others": records.others}
    text = json.dumps(about | {"answered": records.answered.as_dict()}).encode()
    data = io.BytesIO()
    np.savez(data, rows=records.rows, about=np.frombuffer(text, np.uint8))
    body = data.getvalue()
    return zlib.crc32(body).to_bytes(_CRC_BYTES, "little") + body


def _unpack(data: bytes, epoch: int) -> Digest:
    crc, body = data[:_CRC_BYTES], data[_CRC_BYTES:]
    if len(crc) < _CRC_BYTES or zlib.crc32(body) != int.from_bytes(crc, "little"):
        raise ValueError("is broken")
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        rows, about = archive["rows"], json.loads(archive["about"].tobytes())
    if rows.dtype != ROW:
        raise ValueError(f"is of another version, with rows of {rows.dtype}")
    records = Records(epoch, rows, Answered.from_dict(about["answered"]), about["codes"], about["others"])
    return Digest(about["start"], about["end"], records)
