"""Rows to lanes: traces of whole runs over engines that only count."""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from shoal.driver.dispatch import Dispatcher, Tries
from shoal.driver.params import SamplingParams
from shoal.driver.request import FinishedRequest
from shoal.driver.routing import Router

BLOCK = 16


@dataclass(eq=False)
class Item:
    index: int
    prompt_token_ids: list
    length: int  # what its output will be
    prefix: int = -1
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=4096))
    size: int = 1
    cache_salt: str | None = None
    priority: int = 0
    tries: Tries = field(default_factory=Tries)
    results: dict = field(default_factory=dict)


class Engine:
    """Runs `slots` items, a token a step each; computes `budget` prompt tokens a step, those of known prefixes free."""

    def __init__(self, slots, prefix_len, budget=2048):
        self.slots, self.prefix_len, self.budget = slots, prefix_len, budget
        self.queue, self.running, self.known = deque(), {}, set()
        self.steps_busy, self.row_steps, self.prefills = 0, 0, 0
        self.computed = 0

    def step(self):
        room = self.budget
        while self.queue and len(self.running) < self.slots and room > 0:
            item = self.queue.popleft()
            cost = len(item.prompt_token_ids) - (self.prefix_len if item.prefix in self.known else 0)
            self.prefills += item.prefix >= 0 and item.prefix not in self.known
            self.known.add(item.prefix)
            room -= cost
            self.computed += cost + item.length
            self.running[item] = 0
        self.steps_busy += bool(self.running)
        self.row_steps += len(self.running)
        done = []
        for item in self.running:
            self.running[item] += 1
            if self.running[item] >= item.length:
                done.append(item)
        for item in done:
            del self.running[item]
        return done


def run(items, lanes, slots, *, prefix_len=0, kv_tokens=200_000, chunk=256, starts=None, die=None):
    """A whole run, fed as jobs feed it; the engines, and the step at which each had nothing left."""
    dispatcher = Dispatcher(3, BLOCK, by_prefix=True)
    engines = {n: Engine(slots, prefix_len) for n in range(lanes)}
    idle_from = dict.fromkeys(engines, 0)
    waiting, answered, step = deque(items), [], 0
    while waiting or dispatcher.num_waiting or dispatcher.num_open:
        for n in engines:
            if (starts or {}).get(n, 0) == step:
                dispatcher.open_lane(n, slots, kv_tokens)
        window = sum(lane.window for lane in dispatcher.lanes.values())
        while waiting and dispatcher.num_fresh < 512 + window // 2:
            for _ in range(min(chunk, len(waiting))):
                dispatcher.add(waiting.popleft())
        for n in [*dispatcher.lanes, *[None]]:
            for lane in [n] if n is not None else dispatcher.share():
                engines[lane].queue += dispatcher.take(lane)
        while not waiting and (move := dispatcher.rebalance()) is not None:
            for item in move.works:
                assert item in engines[move.source].queue, "what runs is left alone"
                engines[move.source].queue.remove(item)
                engines[move.target].queue.append(item)
        for n in list(dispatcher.lanes):
            for item in engines[n].step():
                item.results[0] = FinishedRequest(item.index, [0] * item.length, "stop")
                dispatcher.done(n, item)
                answered.append(item.index)
            idle_from[n] = step + 1 if engines[n].running or engines[n].queue else idle_from[n]
        dispatcher.report({n: len(engine.queue) for n, engine in engines.items()})
        if die and step == die[1]:
            engines[die[0]] = Engine(slots, prefix_len)
            dispatcher.died(die[0])
            dispatcher.open_lane(die[0], slots, kv_tokens)
        step += 1
        assert step < 1_000_000
    assert sorted(answered) == list(range(len(items)))
    return engines, idle_from, step


def shared_prefixes(rng, num_prefixes, rows_each, prefix_len, own=64, common=0, length=lambda rng: 64):
    start = [rng.randrange(1000) for _ in range(common)]
    prefixes = [start + [rng.randrange(1000) for _ in range(prefix_len - common)] for _ in range(num_prefixes)]
    which = [p for p in range(num_prefixes) for _ in range(rows_each)]
    rng.shuffle(which)
    return [
        Item(i, prefixes[p] + [rng.randrange(1000) for _ in range(own)], length(rng), p) for i, p in enumerate(which)
    ]


@pytest.mark.parametrize("slots", [16, 64])
@pytest.mark.parametrize("common", [0, 32])
def test_a_prefix_is_computed_by_one_engine(slots, common):
    """64 prefixes x 50 rows, shuffled, over 4 engines (ray.data.llm: every prefix by all 4)."""
    for seed in range(2):
        items = shared_prefixes(random.Random(seed), 64, 50, 512, common=common)
        engines, _, _ = run(items, 4, slots, prefix_len=512)
        assert sum(engine.prefills for engine in engines.values()) <= 1.1 * 64
        done = [engine.computed for engine in engines.values()]
        assert max(done) < 1.1 * sum(done) / 4


def test_a_prefix_of_all_rows_is_everywhere():
    items = shared_prefixes(random.Random(0), 1, 1000, 512)
    engines, _, _ = run(items, 4, 16, prefix_len=512)
    done = [engine.computed for engine in engines.values()]
    assert max(done) < 1.05 * sum(done) / 4
    assert sum(engine.prefills for engine in engines.values()) == 4


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("order", ["shuffled", "long first", "long last", "halves"])
def test_no_engine_idles_at_the_tail(lanes, order):
    """Heavy-tailed lengths that nobody knows beforehand: engines end together, but for the rows that run last."""
    rng = random.Random(lanes)
    lengths = [int(min(400, max(1, rng.lognormvariate(4, 1)))) for _ in range(2000)]
    if order != "shuffled":
        lengths.sort(reverse=order == "long first")
    if order == "halves":  # every other chunk is ten times as long
        lengths = [20 if i // 256 % 2 else 200 for i in range(2000)]
    items = [Item(i, [i] * 8, length) for i, length in enumerate(lengths)]
    engines, idle_from, steps = run(items, lanes, 16)
    assert sum(steps - idle for idle in idle_from.values()) / (lanes * steps) < 0.05
    rows = [engine.row_steps for engine in engines.values()]
    assert max(rows) < 1.1 * sum(rows) / lanes


def test_an_engine_that_comes_late_gets_its_share():
    items = [Item(i, [i] * 8, 50) for i in range(3000)]
    engines, idle_from, steps = run(items, 2, 16, starts={1: 1000})
    assert engines[1].row_steps / 16 > 0.95 * (steps - 1000)
    assert min(idle_from.values()) > 0.98 * steps


def test_rows_of_a_dead_engine_are_answered_by_others():
    items = shared_prefixes(random.Random(3), 16, 50, 512)
    run(items, 3, 16, prefix_len=512, die=(1, 100))


def router_with(lanes):
    router = Router(BLOCK)
    for lane in range(lanes):
        router.open(lane, 1000)
    return router


def taken(router, lane):
    found = []
    while router.next_size(lane) is not None:
        found.append(router.pop(lane).index)
    return found


def test_order_on_a_shelf():
    """By priority, then long ones where lengths are known, then as they came."""
    router = router_with(1)
    known = SamplingParams(max_tokens=50, ignore_eos=True)
    longer = SamplingParams(max_tokens=90, ignore_eos=True)
    for item in (
        Item(0, [1], 1), Item(1, [1], 1, params=known), Item(2, [1], 1, params=longer), Item(3, [1], 1, priority=-1),
        Item(4, [1], 1, priority=2), Item(5, [1], 1),
    ):  # fmt: skip
        router.add(item)
    assert taken(router, 0) == [3, 2, 1, 0, 5, 4]


def test_equal_beginnings_go_together_unless_salted():
    router = router_with(4)
    for i in range(8):
        router.add(Item(i, [7] * 40 + [i] * 8, 1, cache_salt="b" if i % 2 else "a"))
    groups = [set(taken(router, lane)) for lane in range(4)]
    assert {0, 2, 4, 6} in groups
    assert {1, 3, 5, 7} in groups


def test_the_heavier_lane_gets_less():
    router = router_with(2)
    router.add(Item(0, [1] * 8, 1, params=SamplingParams(max_tokens=600, ignore_eos=True)))
    for i in range(1, 5):
        router.add(Item(i, [i] * 8, 1, params=SamplingParams(max_tokens=100, ignore_eos=True)))
    assert sorted(len(taken(router, lane)) for lane in range(2)) == [1, 4]


def test_taking_back_and_closing():
    router = router_with(2)
    for i in range(10):
        router.add(Item(i, [i] * 8, 1))
    assert router.remove(3).index == 3
    assert router.remove(3) is None
    first = router.pop(0)
    assert router.remove(first.index) is None, "it is in the engine"
    router.close(1)
    assert sorted([first.index, *taken(router, 0)]) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    router.close(0)
    router.add(Item(20, [1], 1))
    assert router.num_waiting == 1
    assert router.remove(20).index == 20
    router.add(Item(21, [1], 1))
    router.open(5, 1000)
    assert taken(router, 5) == [21]
