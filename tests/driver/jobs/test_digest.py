"""Digests of the ledger: a recovery that has them finds what it finds without them, and it needs none of them."""

import dataclasses
import errno
import logging
import random

import pytest

from shoal.driver.jobs.accounts import Accounts
from shoal.driver.jobs.committer import CLEARED, recover
from shoal.driver.jobs.prefix import Position
from shoal.driver.jobs.state import digest
from shoal.driver.jobs.state.folder import Folder
from shoal.driver.jobs.state.ledger import Ledger, SupersededError
from shoal.driver.jobs.state.store import part_name


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(digest, "_RECORDS", 40)
    monkeypatch.setattr(digest, "_AT_ONCE", 8)


def random_record(draw, row):
    key = row.to_bytes(12, "big").hex()
    about = {"id": f"row-{row}\ud800", "key": key}
    kind = draw.choices(["ok", "err", "try", "at", "engine", CLEARED], [60, 10, 10, 10, 5, 5])[0]
    rest = {
        "ok": {"index": row, "usage": [draw.randrange(5000), draw.randrange(900), draw.randrange(9)],
               "finish_reason": draw.choice(["stop", "length", None]), "attempt": 1},
        "err": {"index": row, "code": draw.choice(["bad_role", "too_long"]), "stage": "input"},
        "try": {"alone": draw.random() < 0.5, "ranks": draw.random() < 0.5},
        "at": {"index": row, "file": 0, "line": row, "offset": 10 * row},
        "engine": {"session": draw.choice("ab"), "generated": draw.randrange(10_000)},
        CLEARED: {},
    }[kind]  # fmt: skip
    return {"t": kind} | (about if kind in ("ok", "err", "try") else {}) | rest


def run(folder, seed, rows):
    """A run that takes over and writes records of some rows; half of a batch is torn off at its end."""
    draw = random.Random(seed)
    ledger = Ledger(Folder(str(folder)))
    for row in rows:
        ledger.append(random_record(draw, row), b'{"n":%d}' % row)
        if draw.random() < 0.3:
            ledger.sync()
    ledger.sync()
    ledger.close()
    with open(folder / part_name(ledger.epoch), "ab") as file:
        file.write(b"0123 torn")


def digests(folder):
    return sorted(path.name for path in folder.glob("digest-*"))


def recovered(folder, retry_errors=False, since=1):
    """All that a recovery finds, as plain values."""
    ledger, accounts = Ledger(Folder(str(folder))), Accounts(started=0.0)
    found = recover(ledger, accounts, retry_errors, since)
    keys = [row.to_bytes(12, "big") for row in range(400)]
    rows = [ledger.row(value >> 1) for value in found.done.find(keys).tolist() if value >= 0]
    prefix = found.prefix and (found.prefix.end, found.prefix.values.tolist(), found.prefix.ids.nbytes)
    ledger.close()
    return dataclasses.asdict(accounts), found.done.find(keys).tolist(), rows, found.tries, prefix


def without(folder):
    for path in folder.glob("digest-*"):
        path.unlink()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("retry_errors", [False, True])
def test_what_is_found_is_the_same(tmp_path, seed, retry_errors):
    run(tmp_path, seed, range(150))
    run(tmp_path, seed + 100, range(100, 300))  # some rows again, as errors that are tried again are
    assert len(digests(tmp_path)) >= 5
    with_them = recovered(tmp_path, retry_errors)
    without(tmp_path)
    assert recovered(tmp_path, retry_errors) == with_them
    assert with_them[0]["ok"] > 100


def test_they_are_read_and_lines_only_after_them(tmp_path, monkeypatch):
    run(tmp_path, 2, range(300))
    spans = []
    real = Folder.chunks

    def chunks(self, name, size, start=0):
        spans.append((start, size))
        return real(self, name, size, start)

    ledger = Ledger(Folder(str(tmp_path)))
    monkeypatch.setattr(Folder, "chunks", chunks)
    assert sum(len(records.rows) + len(records.others) for records in ledger.records()) == 300
    *before, tail = [span for span in spans if span[0] < span[1]]
    assert not before
    assert 0 < tail[1] - tail[0] < 0.4 * tail[1]


def test_broken_ones_are_said_and_not_used(tmp_path, caplog):
    run(tmp_path, 2, range(300))
    whole = recovered(tmp_path)
    names = digests(tmp_path)
    for name, cut in zip(names[:4], (0, 100, -1, -40), strict=True):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:cut])
    with caplog.at_level(logging.WARNING):
        assert recovered(tmp_path) == whole
    assert [name for name in names if f"{name} is broken" in caplog.text] == names[:4]


def test_a_byte_that_changed_is_noticed(tmp_path):
    run(tmp_path, 2, range(60))
    store, (name,) = Folder(str(tmp_path)), digests(tmp_path)
    data = (tmp_path / name).read_bytes()
    assert len(list(digest.read_digests(store, 1, 1 << 30))) == 1
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 + place % 255
        (tmp_path / name).write_bytes(changed)
        assert not list(digest.read_digests(store, 1, 1 << 30))


def test_no_room_for_one_costs_only_time(tmp_path, monkeypatch, caplog):
    real, calls = Folder.put, []

    def full(self, name, data):
        if name.startswith("digest"):
            calls.append(name)
            if len(calls) in (1, 3):
                raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, data)

    monkeypatch.setattr(Folder, "put", full)
    run(tmp_path, 3, range(300))
    assert len(digests(tmp_path)) == len(calls) - 2 >= 2
    assert "no room for a digest" in caplog.text
    with_gaps = recovered(tmp_path)
    without(tmp_path)
    assert recovered(tmp_path) == with_gaps


def test_those_of_a_zombie_do_not_count(tmp_path):
    zombie = Ledger(Folder(str(tmp_path)))
    draw = random.Random(5)
    for row in range(50):
        zombie.append(random_record(draw, row), b"{}")
    heir = Ledger(Folder(str(tmp_path)))
    with pytest.raises(SupersededError):
        zombie.sync()
    assert not digests(tmp_path)
    zombie._digests.synced(zombie._end)  # it had looked for an heir just before there was one
    assert len(digests(tmp_path)) == 1
    assert recovered(tmp_path)[0]["ok"] == 0
    heir.close()


def test_starting_over_removes_them(tmp_path):
    run(tmp_path, 6, range(100))
    assert digests(tmp_path)
    Ledger(Folder(str(tmp_path)), fresh=True).close()
    assert not digests(tmp_path)


def test_positions_at_full_size(tmp_path, monkeypatch):
    """A digest holds what the prefix needs: indices, ids and positions."""
    ledger = Ledger(Folder(str(tmp_path)))
    for row in range(100):
        key, usage = row.to_bytes(12, "big").hex(), [1, 1, 0]
        ledger.append({"t": "ok", "id": f"row-{row}", "key": key, "index": row, "usage": usage}, b"{}")
    ledger.append(Position(90, 0, 90, 900).record())
    ledger.sync()
    ledger.close()
    found = recover(Ledger(Folder(str(tmp_path))), Accounts(), False, 1)
    assert found.prefix.end == Position(90, 0, 90, 900)
    assert len(digests(tmp_path)) == 1
