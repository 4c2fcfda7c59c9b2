"""The ledger: torn writes, full disks, take-overs, and two processes that think they own it."""

import errno
import json
import os
import uuid

import fsspec
import pytest

from shoal.driver.jobs.state.folder import Folder
from shoal.driver.jobs.state.ledger import Ledger, SupersededError, encode
from shoal.driver.jobs.state.objects import Objects
from shoal.driver.jobs.state.open_store import open_store
from shoal.driver.jobs.state.store import LedgerFullError, part_name


@pytest.fixture(params=["folder", "objects"])
def new_store(request, tmp_path):
    """new_store() -> a store of the same place, as another process would open it."""
    if request.param == "folder":
        return lambda: Folder(str(tmp_path / "state"))
    place = f"/{uuid.uuid4()}"
    return lambda: Objects(fsspec.filesystem("memory"), place, rows=3, seconds=1000)


def meta_of(n, kind="ok"):
    common = {"t": kind, "id": f"row-{n}\ud800", "key": n.to_bytes(12, "little").hex(), "index": n}
    return common | ({"usage": [n, 2 * n, 0]} if kind == "ok" else {"code": "bad_row"})


def put(ledger, *numbers, kind="ok"):
    return [ledger.append(meta_of(n, kind), b'{"n":%d}' % n) for n in numbers]


def numbers(ledger):
    return [n for records in ledger.records() for n in records.rows["index"].tolist()]


def locations(ledger):
    return [value >> 1 for records in ledger.records() for value in records.rows["value"].tolist()]


def test_what_is_synced_is_there(new_store):
    ledger = Ledger(new_store())
    assert (ledger.epoch, numbers(ledger)) == (1, [])
    places = put(ledger, 0, 1, 2, 3)
    bad = put(ledger, 4, kind="err")
    ledger.sync()
    assert [ledger.row(place) for place in places] == [(False, b'{"n":%d}' % n) for n in range(4)]
    assert ledger.row(bad[0]) == (True, b'{"n":4}')
    put(ledger, 5)  # never synced
    ledger.close()
    second = Ledger(new_store())
    assert (second.epoch, numbers(second)) == (2, [0, 1, 2, 3, 4])
    assert second.row(locations(second)[0]) == (False, b'{"n":0}')
    put(second, 6)
    second.sync()
    third = Ledger(new_store())
    assert numbers(third) == [0, 1, 2, 3, 4, 6]
    assert third.num_torn_bytes == 0


@pytest.mark.contract
def test_a_zombie_is_shut_out(new_store):
    """Clause 5."""
    zombie = Ledger(new_store())
    put(zombie, 0)
    zombie.sync()
    heir = Ledger(new_store())
    put(zombie, 1)
    with pytest.raises(SupersededError, match="epoch 2 after 1"):
        zombie.sync()
    with pytest.raises(SupersededError):
        zombie.check_owner()
    put(heir, 1)
    heir.sync()
    for _ in range(3):  # what the zombie wrote late stays out, however often the job is taken over
        assert numbers(Ledger(new_store())) == [0, 1]


def test_a_heir_that_dies_before_it_seals(new_store):
    first = Ledger(new_store())
    put(first, 0)
    first.sync()
    new_store().claim(2)
    third = Ledger(new_store())
    assert (third.epoch, numbers(third)) == (3, [0])
    with pytest.raises(SupersededError):
        first.check_owner()


def test_starting_over_forgets_and_still_shuts_out(new_store):
    zombie = Ledger(new_store())
    put(zombie, 0)
    zombie.sync()
    fresh = Ledger(new_store(), fresh=True)
    assert numbers(fresh) == []
    put(fresh, 7)
    fresh.sync()
    put(zombie, 1)
    with pytest.raises(SupersededError):
        zombie.sync()
    assert numbers(Ledger(new_store())) == [7]


def test_claims_are_exclusive(new_store):
    one, two = new_store(), new_store()
    one.claim(1)
    with pytest.raises(FileExistsError):
        two.claim(1)
    assert Ledger(two).epoch == 2


def test_small_files(new_store):
    store = new_store()
    assert store.get("status.json") is None
    store.put("status.json", b"one")
    store.put("status.json", b"two")
    assert new_store().get("status.json") == b"two"
    assert store.epochs() == []


def test_objects_wait_until_they_are_worth_it():
    filesystem = fsspec.filesystem("memory")
    store = Objects(filesystem, f"/{uuid.uuid4()}", rows=3, seconds=1000)
    ledger = Ledger(store)
    put(ledger, 0, 1)
    ledger.sync(force=False)
    assert not store.parts(1)
    put(ledger, 2)
    ledger.sync(force=False)
    (places,) = [put(ledger, 3)]
    ledger.sync(force=True)
    assert [name[-10:] for name in store.parts(1)] == ["0000.jsonl", "0001.jsonl"]
    assert ledger.row(places[0]) == (False, b'{"n":3}')
    hasty = Objects(filesystem, f"/{uuid.uuid4()}", rows=1000, seconds=0)
    ledger = Ledger(hasty)
    put(ledger, 0)
    ledger.sync(force=False)
    assert len(hasty.parts(1)) == 1


@pytest.mark.contract
def test_a_torn_last_line_at_every_byte(tmp_path):
    """Clause 12."""
    lines = [encode(meta_of(n), b'{"text":"a\\tb"}') for n in range(4)]
    whole = b"".join(lines[:3])
    for cut in range(len(lines[3])):
        folder = tmp_path / str(cut)
        store = Folder(str(folder))
        (folder / part_name(1)).write_bytes(whole + lines[3][:cut])
        ledger = Ledger(store)
        assert numbers(ledger) == [0, 1, 2]
        assert ledger.num_torn_bytes == cut
        ledger.close()


def test_a_broken_line_in_the_middle_costs_only_itself(tmp_path):
    lines = [encode(meta_of(n), b"{}") for n in range(4)]
    lines[1] = lines[1].replace(b"{}", b"[]")
    Folder(str(tmp_path))
    (tmp_path / part_name(1)).write_bytes(b"".join(lines))
    assert numbers(Ledger(Folder(str(tmp_path)))) == [0, 2, 3]


@pytest.mark.contract
def test_a_full_disk_harms_nothing(tmp_path, monkeypatch):
    """Clause 12."""
    ledger = Ledger(Folder(str(tmp_path)))
    put(ledger, 0)
    ledger.sync()
    size = (tmp_path / part_name(1)).stat().st_size
    places = put(ledger, 1, 2)
    real = os.write

    def half(handle, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[: len(data) // 2])

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(LedgerFullError, match="No space left"):
                ledger.sync()
        assert (tmp_path / part_name(1)).stat().st_size == size
    ledger.sync()
    assert [ledger.row(place)[1] for place in places] == [b'{"n":1}', b'{"n":2}']
    assert numbers(Ledger(Folder(str(tmp_path)))) == [0, 1, 2]


def test_other_write_errors_are_raised(tmp_path, monkeypatch):
    ledger = Ledger(Folder(str(tmp_path)))
    put(ledger, 0)

    def broken(handle, data):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(OSError, match="Input/output"):
        ledger.sync()


def test_large_parts_are_read_piece_by_piece(tmp_path, monkeypatch):
    from shoal.driver.jobs.state import folder

    monkeypatch.setattr(folder, "_CHUNK", 1000)
    ledger = Ledger(Folder(str(tmp_path)))
    places = put(ledger, *range(500))
    ledger.sync()
    places += put(ledger, *range(500, 600))
    assert ledger.row(places[3])[1] == b'{"n":3}'  # mapped now, and grown after
    ledger.sync()
    heir = Ledger(Folder(str(tmp_path)))
    assert [json.loads(heir.row(place)[1])["n"] for place in locations(heir)] == list(range(600))
    assert [ledger.row(place)[1] for place in places[498:502]] == [b'{"n":%d}' % n for n in range(498, 502)]


def test_stores_without_conditional_writes_are_refused(tmp_path):
    class Careless:
        def pipe_file(self, path, value, **kwargs):
            raise AssertionError

    with pytest.raises(ValueError, match="no conditional writes"):
        open_store(Careless(), "x", local=False, rows=1, seconds=1)
    assert isinstance(open_store(None, str(tmp_path), local=True, rows=1, seconds=1), Folder)
    assert isinstance(open_store(fsspec.filesystem("memory"), "/x", local=False, rows=1, seconds=1), Objects)


@pytest.mark.contract
def test_the_end_of_a_long_part_is_enough(tmp_path, monkeypatch):
    """Clause 12: a take-over reads a part's end, and all of it where that holds no whole line."""
    from shoal.driver.jobs.state import ledger as module

    lines = [encode(meta_of(n), b'{"n":1}') for n in range(50)]
    whole = b"".join(lines)
    for tail in (1, 40, len(lines[0]) + 7, 10_000):
        monkeypatch.setattr(module, "_TAIL_BYTES", tail)
        for rest in (b"", lines[0][:-1], b"x" * 100 + b"\n", b"\n" * 30, lines[0][3:]):
            folder = tmp_path / f"{tail}-{hash(rest)}"
            store = Folder(str(folder))
            (folder / part_name(1)).write_bytes(whole + rest)
            ledger = Ledger(store)
            assert numbers(ledger) == list(range(50))
            assert ledger.num_torn_bytes == len(rest)
            ledger.close()
