"""The one place that writes to the ledger: answers, errors and tries, and what recovery makes of them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoal.driver.dispatch import Tries
from shoal.driver.jobs.accounts import Accounts, Usage
from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.forms.base import Form
from shoal.driver.jobs.json_text import dump
from shoal.driver.jobs.keys import KeyTable, Numbers
from shoal.driver.jobs.prefix import POSITION, Position, Prefix, PrefixFinder
from shoal.driver.jobs.sources.registry import columns_of, parse_object
from shoal.driver.jobs.state.ledger import Ledger
from shoal.driver.jobs.state.records import Records
from shoal.driver.jobs.work import Chunk, Work
from shoal.driver.outputs import make_output

if TYPE_CHECKING:
    from shoal.driver.detokenize import TextDecoder

_SYNC_S = 0.1  # oldest an answer gets in memory
_BETWEEN_SYNCS_S = 0.02  # a busy disk takes this long: at thousands of rows a second the loop would only wait for it
CLEARED = "clear"


@dataclass(slots=True)
class Recovered:
    """What earlier runs left."""

    done: KeyTable = field(default_factory=lambda: KeyTable(with_values=True))  # key: location << 1 | is error
    tries: dict[bytes, Tries] = field(default_factory=dict)
    prefix: Prefix | None = None


class _Settled:
    """Settled rows of the ledger, many at a time: a resumed job waits for each microsecond of each of them."""

    def __init__(self, found: Recovered, prefix: PrefixFinder, accounts: Accounts) -> None:
        self._found, self._prefix, self._accounts = found, prefix, accounts
        self.errors: dict[bytes, tuple[int, str]] = {}

    def add(self, records: Records) -> None:
        """Takes in those that are of rows with an answer or an error."""
        rows = records.rows
        if self._prefix.counts(records.epoch):
            self._prefix.settled(rows["index"], rows["value"], rows["id"])
        is_error = rows["value"] & 1 == 1
        for row, code in zip(rows[is_error], records.codes, strict=True):
            self.errors[row["key"].tobytes()] = int(row["value"]), sys.intern(code)
        answers = rows[~is_error]
        self._found.done.extend(answers["key"].tobytes(), answers["value"])
        self._accounts.answered_before(records.answered)

    def open_errors(self) -> dict[bytes, tuple[int, str]]:
        """Errors of rows that no later run answered."""
        answered = self._found.done.find(list(self.errors)) >= 0
        return {key: error for (key, error), gone in zip(self.errors.items(), answered, strict=True) if not gone}


def recover(ledger: Ledger, accounts: Accounts, retry_errors: bool, since: int | None) -> Recovered:
    """Reads the ledger; what it says is counted into `accounts`. `since`: as PrefixFinder takes it."""
    found, prefix = Recovered(), PrefixFinder(since)
    settled = _Settled(found, prefix, accounts)
    for records in ledger.records():
        settled.add(records)
        for meta in records.others:
            kind = meta["t"]
            if kind == POSITION:
                if prefix.counts(records.epoch):
                    prefix.position(meta)
            elif kind == "engine":
                accounts.generated[meta["session"]] = meta["generated"]
            elif kind == CLEARED:
                for tries in found.tries.values():
                    tries.in_company = tries.ranks_in_company = 0
            elif kind == "try":
                tries = found.tries.setdefault(bytes.fromhex(meta["key"]), Tries())
                tries.add(meta["alone"], meta.get("ranks", False))
    errors = settled.open_errors()
    if retry_errors:
        for key in errors:
            found.tries.pop(key, None)
        errors = {}
    for key, (value, _) in errors.items():
        found.done.add(key, value)
    accounts.found(accounts.ok, dict(errors.values()))
    found.prefix = prefix.find(keep_errors=not retry_errors)
    return found


class Committer:
    """Writes what became of rows. For one thread."""

    def __init__(self, ledger: Ledger, form: Form, accounts: Accounts, commit_rows: int) -> None:
        self.ledger, self.where = ledger, Numbers()
        self._form, self._accounts, self._commit_rows = form, accounts, commit_rows
        self._synced = time.monotonic()
        self._recorded: dict[str, int] = {}  # tokens that the ledger says an engine has made
        self._position = Position()  # the last one in the ledger
        self.decoder: TextDecoder | None = None  # known with the model

    def settle(self, chunk: Chunk) -> list[int]:
        """Rows that need no engine; the indices of those that are new."""
        if chunk.known is not None:
            self.where.fill(chunk.known.indices, chunk.known.values >> 1)
            self._accounts.met_many(chunk.known.values)
        new: list[int] = []
        for row in chunk.settled:
            if row.fault is None:
                self.where[row.index] = row.location >> 1
                self._accounts.met(row.location, bool(row.location & 1))
            else:
                self._error(row.index, row.row_id, row.key, row.raw, row.fault)
                new.append(row.index)
        return new

    def reached(self, chunk: Chunk) -> None:
        """The input was read so far. Where nothing is to be done, nothing is written."""
        if chunk.work and chunk.end.index > self._position.index:
            self._position = chunk.end
            self.ledger.append(chunk.end.record())

    def answer(self, work: Work) -> None:
        """A row whose sequences are all finished."""
        row = work.row
        children = [work.results[child] for child in range(work.size)]
        output = make_output(
            work.row_id, row.prompt, row.token_ids, row.bound.params, children, self.decoder, log_stats=False
        )
        if output.error is not None:
            codes = [child.error_code for child in children if child.error_code is not None]
            self.error(work, Fault(codes[0] if codes else "engine_refused", "engine", output.error))
            return
        usage = Usage(len(row.token_ids), sum([len(one.token_ids) for one in children]), children[0].num_cached_tokens)
        meta = {
            "t": "ok",
            "id": work.row_id,
            "key": work.key.hex(),
            "index": work.index,
            "usage": [usage.prompt, usage.completion, usage.cached],
            "finish_reason": children[0].finish_reason,
            "attempt": 1 + work.tries.total,
        }
        self.where[work.index] = self.ledger.append(
            meta, dump(self._form.answer(work.row_id, parse_object(work.raw), output))
        )
        self._accounts.answered(usage, children[0].finish_reason)

    def error(self, work: Work, fault: Fault) -> None:
        """A row that will have no answer."""
        self._error(work.index, work.row_id, work.key, work.raw, fault)

    def _error(self, index: int, row_id: str, key: bytes, raw: bytes, fault: Fault) -> None:
        meta = {"t": "err", "id": row_id, "key": key.hex(), "index": index, "code": fault.code, "stage": fault.stage}
        self.where[index] = self.ledger.append(meta, dump(self._form.failure(row_id, columns_of(raw), fault)))
        self._accounts.failed(fault.code)

    def tried(self, work: Work, alone: bool, of_ranks: bool = False) -> None:
        """An engine, or only its ranks, died with the row in it."""
        meta = {"t": "try", "id": work.row_id, "key": work.key.hex(), "alone": alone, "ranks": of_ranks}
        self.ledger.append(meta)

    def cleared(self) -> None:
        """A guilty row was found: nothing is held against the others."""
        self.ledger.append({"t": CLEARED})

    def made(self, session: str, tokens: int) -> None:
        """Tokens that an engine has made so far."""
        self._accounts.generated[session] = tokens
        if self._recorded.get(session) != tokens:
            self._recorded[session] = tokens
            self.ledger.append({"t": "engine", "session": session, "generated": tokens})

    def is_due(self) -> bool:
        """There are enough answers to make durable, or they are old enough."""
        waiting, age_s = self.ledger.num_unsynced, time.monotonic() - self._synced
        return (waiting >= self._commit_rows and age_s >= _BETWEEN_SYNCS_S) or (waiting > 0 and age_s >= _SYNC_S)

    def sync(self, force: bool = False) -> bool:
        """Makes answers durable when that is due. True where it was tried."""
        if not force and not self.is_due():
            return False
        self.ledger.sync(force)
        self._synced = time.monotonic()
        if not self.ledger.num_unsynced:
            self._accounts.mark_durable()
        return True
