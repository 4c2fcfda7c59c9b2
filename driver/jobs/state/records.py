"""Records of the ledger as recovery wants them: columns of many rows, made of lines or read from a digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.driver.jobs.accounts import Answered
from shoal.driver.jobs.keys import HASH, id_hash

ROW = np.dtype([("key", HASH), ("id", HASH), ("index", "<i8"), ("value", "<i8")])
OK, ERROR = "ok", "err"


@dataclass(slots=True)
class Records:
    """Some records of one epoch.

    `rows`: ROW of each answer and error, in their order; "id" is the hash of its id, "value" is location << 1 | whether
    it is an error. `codes`: of the errors. `others`: records of other kinds, whole, in their order.
    """

    epoch: int
    rows: npt.NDArray[np.void]
    answered: Answered = field(default_factory=Answered)
    codes: list[str] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, epoch: int, metas: Sequence[Mapping[str, Any]], locations: Sequence[int]) -> Records:
        """Of what the lines say, and where they are."""
        settled, values, answers = [], [], []
        found = cls(epoch, np.empty(0, ROW))
        for meta, location in zip(metas, locations, strict=True):
            if meta["t"] == OK:
                answers.append(meta)
                values.append(location << 1)
            elif meta["t"] == ERROR:
                found.codes.append(meta["code"])
                values.append(location << 1 | 1)
            else:
                found.others.append(dict(meta))
                continue
            settled.append(meta)
        if not settled:
            return found
        found.rows = rows = np.empty(len(settled), ROW)
        rows["key"] = np.frombuffer(bytes.fromhex("".join([meta["key"] for meta in settled])), HASH)
        rows["id"] = np.frombuffer(b"".join([id_hash(meta["id"]) for meta in settled]), HASH)
        rows["index"] = [meta["index"] for meta in settled]
        rows["value"] = values
        found.answered = Answered.of([m["usage"] for m in answers], [m.get("finish_reason") for m in answers])
        return found

    @classmethod
    def join(cls, pieces: Sequence[Records]) -> Records:
        """Of several, in their order, one."""
        joined = cls(pieces[0].epoch, np.concatenate([piece.rows for piece in pieces]))
        for piece in pieces:
            joined.answered.add(piece.answered)
            joined.codes += piece.codes
            joined.others += piece.others
        return joined
