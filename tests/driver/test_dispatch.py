"""The dispatcher by hand: windows, suspicion, clearing, moving."""

import random
from types import SimpleNamespace

import pytest

from shoal.driver.dispatch import GROUP, Dispatcher, Tries, Trust, trust
from shoal.driver.jobs.work import Work
from shoal.driver.params import SamplingParams


def work(index, n=1):
    row = SimpleNamespace(
        bound=SimpleNamespace(params=SamplingParams(n=n)), token_ids=[1] * 8, cache_salt=None, priority=0
    )
    return Work(index, str(index), b"", {}, row)


def filled(count, lanes=1, slots=4, n=1):
    dispatcher = Dispatcher(3)
    for i in range(count):
        dispatcher.add(work(i, n))
    for number in range(lanes):
        dispatcher.open_lane(number, slots)
    return dispatcher


def indices(works):
    return [one.index for one in works]


def test_a_lane_is_kept_twice_as_full_as_it_can_run():
    dispatcher = filled(100)
    taken = dispatcher.take(0)
    assert indices(taken) == list(range(8))
    assert dispatcher.take(0) == []
    dispatcher.done(0, taken[3])
    assert indices(dispatcher.take(0)) == [8]
    assert (dispatcher.num_open, dispatcher.num_waiting) == (8, 91)


def test_deliveries_are_worth_it():
    dispatcher = filled(1000, slots=64)
    taken = dispatcher.take(0)
    for one in taken[:15]:
        dispatcher.done(0, one)
    assert dispatcher.take(0) == []
    dispatcher.done(0, taken[15])
    assert len(dispatcher.take(0)) == 16


def test_rows_of_many_sequences():
    dispatcher = filled(10, n=3)
    assert indices(dispatcher.take(0)) == [0, 1]
    assert indices(filled(3, n=50).take(0)) == [0], "a row larger than the window runs by itself"


def test_a_dead_lane_costs_innocents_little():
    dispatcher = filled(100, slots=50)
    dispatcher.take(0)
    assert len(dispatcher.died(0).tried) == 100
    dispatcher.open_lane(0, 50)
    first = dispatcher.take(0)
    assert len(first) == GROUP, "under suspicion they run a few at a time"
    for _ in range(100):
        for one in list(dispatcher.lanes[0].works.values()):
            dispatcher.done(0, one)
        dispatcher.take(0)
    assert dispatcher.num_open == dispatcher.num_waiting == 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lanes", [1, 2])
def test_killers_are_found_and_only_they(seed, lanes):
    rng = random.Random(seed)
    killers = set(rng.sample(range(200), rng.choice([0, 1, 1, 2, 5])))
    dispatcher = filled(200, lanes=lanes, slots=rng.choice([2, 8, 64]))
    slots = dispatcher.lanes[0].slots
    finished, guilty, deaths, chance = [], [], 0, rng.choice([0, 0, 3])
    while dispatcher.num_open or dispatcher.num_waiting:
        for number in list(dispatcher.lanes):
            dispatcher.take(number)
            works = list(dispatcher.lanes[number].works.values())
            kills = any(one.index in killers for one in works)
            accident = chance and rng.random() < 0.02 and dispatcher.lanes[number].mode == Trust.FREE
            if works and (kills or accident):
                chance -= bool(accident and not kills)
                deaths += 1
                verdict = dispatcher.died(number)
                assert len(verdict.tried) == len(works)
                guilty += [verdict.guilty.index] if verdict.guilty else []
                dispatcher.open_lane(number, slots)
            elif works:
                one = rng.choice(works)
                dispatcher.done(number, one)
                finished.append(one.index)
    assert sorted(guilty) == sorted(killers)
    assert sorted(finished) == sorted(set(range(200)) - killers)
    assert deaths <= 8 * len(killers) + 3


def test_suspects_from_an_earlier_run():
    dispatcher = Dispatcher(3)
    for i, tries in enumerate([Tries(), Tries(1, 0), Tries(2, 0), Tries(2, 2)]):
        one = work(i)
        one.tries = tries
        assert trust(one) == [Trust.FREE, Trust.GROUP, Trust.ALONE, Trust.ALONE][i]
        dispatcher.add(one)
    dispatcher.open_lane(0, 8)
    for expected in ([1], [2], [3], [0]):
        taken = dispatcher.take(0)
        assert indices(taken) == expected
        assert dispatcher.take(0) == []
        if expected == [3]:
            verdict = dispatcher.died(0)
            assert (verdict.guilty.index, verdict.guilty.tries.alone) == (3, 3)
            dispatcher.open_lane(0, 8)
        else:
            dispatcher.done(0, taken[0])


def test_one_lane_tries_suspects_while_another_works_on():
    dispatcher = filled(100, lanes=2)
    for number in (0, 1):
        dispatcher.take(number)
    dispatcher.died(0)
    dispatcher.open_lane(0, 4)
    assert dispatcher.lanes[1].mode == Trust.FREE
    assert {trust(one) for one in dispatcher.take(0)} == {Trust.GROUP}
    for one in list(dispatcher.lanes[1].works.values()):
        dispatcher.done(1, one)
    assert {trust(one) for one in dispatcher.take(1)} == {Trust.FREE}


def test_the_tail_moves_to_idle_lanes():
    dispatcher = filled(8, lanes=2)
    assert len(dispatcher.take(0)) == 8
    assert dispatcher.take(1) == []
    move = dispatcher.rebalance()
    assert (move.source, move.target, indices(move.works)) == (0, 1, [4, 5, 6, 7])
    assert dispatcher.rebalance() is None
    assert [lane.num_sequences for lane in dispatcher.lanes.values()] == [4, 4]


def test_a_queue_alone_moves_nothing():
    """While prompts are computed rows wait in both engines; whose report came last is chance."""
    dispatcher = filled(16, lanes=2, slots=64)
    assert dispatcher.router.steal(1, 0) == 8
    for lane in (0, 1):
        dispatcher.take(lane)
    assert [lane.num_sequences for lane in dispatcher.lanes.values()] == [8, 8]
    dispatcher.report({0: 6, 1: 0})
    assert dispatcher.rebalance() is None
    for one in list(dispatcher.lanes[1].works.values()):
        dispatcher.done(1, one)
    assert len(dispatcher.rebalance().works) == 4, "now the other one idles"


def test_rows_that_ranks_died_with_stay():
    """Else two engines hand them to each other for ever, and neither has one alone."""
    dispatcher = filled(8, lanes=2)
    for one in dispatcher.take(0)[5:]:
        one.tries.add(False, of_ranks=True)
    assert indices(dispatcher.rebalance().works) == [4]
    assert dispatcher.rebalance() is None


def test_nothing_moves_while_rows_wait_or_that_has_results():
    assert filled(100, lanes=2).rebalance() is None
    dispatcher = filled(8, lanes=2)
    dispatcher.take(0)
    dispatcher.lanes[0].works[7].results[0] = object()
    assert dispatcher.rebalance() is None
