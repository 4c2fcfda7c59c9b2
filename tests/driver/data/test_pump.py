"""The pump by hand: blocks in, answers out as they finish, engines that die."""

import itertools
import queue
import threading
from types import SimpleNamespace

import pytest

from shoal.driver.actor import Collected
from shoal.driver.binding import Row
from shoal.driver.data.pump import Pump
from shoal.driver.jobs.faults import Fault
from shoal.driver.params import SamplingParams
from shoal.driver.request import FinishedRequest


class Engine:
    """Answers requests when told to; dies with a request for the tokens [13]."""

    resolved = SimpleNamespace(max_num_seqs=4)

    def __init__(self, held=()):
        self.inbox, self.held, self.most, self.open = queue.Queue(), set(held), 0, 0

    def submit(self, requests):
        self.open += len(requests)
        self.most = max(self.most, self.open)
        for request in requests:
            self.inbox.put(request)

    def collect(self, timeout):
        found = []
        try:
            request = self.inbox.get(timeout=timeout)
            if request.token_ids == [13]:
                raise RuntimeError("killed")
            if request.number not in self.held:
                found = [FinishedRequest(request.number, request.token_ids, "length")]
                self.open -= 1
        except queue.Empty:
            pass
        return Collected(found)

    def end_when_silent(self, seconds):
        pass

    def num_made_tokens(self):
        return 0

    def shutdown(self):
        pass


class Binder:
    def requests(self, row, first, count):
        return [SimpleNamespace(number=row.first_sequence + i, token_ids=row.token_ids) for i in range(count)]


def rows(*ids, n=1):
    return [Row(i, 0, 0, None, [one], SimpleNamespace(params=SamplingParams(n=n))) for i, one in enumerate(ids)]


@pytest.fixture
def make():
    pumps = []

    def start(engines, **limits):
        pump = Pump(lambda: next(engines), **({"solo_deaths": 3, "max_restarts": 12, "idle_s": 60.0} | limits))
        pump.open(Binder())
        pumps.append(pump)
        return pump

    yield start
    for pump in pumps:
        pump.close()


def tokens(answers):
    return [answer if isinstance(answer, Fault) else [one.token_ids[0] for one in answer] for answer in answers]


def test_blocks_leave_as_they_finish(make):
    """The first block has a row that never ends; those after it do not wait for it."""
    engine = Engine(held=[1])
    pump = make(iter([engine]))
    first = pump.run(rows(1, 2, 3))
    later = [pump.run(rows(*range(20, 30), n=2)) for _ in range(5)]
    for future in later:
        assert tokens(future.result(20)) == [[i, i] for i in range(20, 30)]
    assert not first.done()
    assert engine.most <= 2 * 4, "the engine is given no more than its window"
    assert pump.run([]).result(20) == []


def test_a_row_that_kills_gets_its_error_and_no_other(make):
    pump = make(Engine() for _ in itertools.count())
    futures = [pump.run(rows(*ids)) for ids in ((1, 2, 3), (4, 13, 5), (6, 7))]
    found = [tokens(future.result(60)) for future in futures]
    assert found[0] == [[1], [2], [3]]
    assert found[2] == [[6], [7]]
    (good, bad, other) = found[1]
    assert (good, other) == ([4], [5])
    assert bad.code == "engine_killed"
    assert "killed" in bad.message


def test_an_engine_without_rows_ends_and_comes_back(make):
    """One that is used stays, however long; after a rest another takes over, also when rows come as the first ends."""
    ended = threading.Event()
    slow = threading.Event()

    class Resting(Engine):
        def shutdown(self):
            ended.set()
            assert slow.wait(20)

    engines = [Resting(held=[0]), Engine()]
    pump = make(iter(engines), idle_s=0.3)
    held = pump.run(rows(1))
    assert not ended.wait(1.0), "it has a row"
    engines[0].inbox.put(SimpleNamespace(number=0, token_ids=[1]))
    engines[0].held.clear()
    assert tokens(held.result(20)) == [[1]]
    assert ended.wait(20)
    later = pump.run(rows(2, 3))
    assert not engines[1].most, "the first has not given back what it holds"
    slow.set()
    assert tokens(later.result(20)) == [[2], [3]]
    assert engines[1].most


def test_engines_that_only_die_fail_everything(make):
    pump = make((Engine() for _ in itertools.count()), max_restarts=1, solo_deaths=9)
    waiting = pump.run(rows(13))
    with pytest.raises(RuntimeError, match="killed"):
        waiting.result(60)
    with pytest.raises(RuntimeError, match="killed"):
        pump.run(rows(1)).result(60)


def test_an_engine_that_does_not_start_is_said_at_once():
    def start():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        Pump(start, 3, 12, 60.0)
