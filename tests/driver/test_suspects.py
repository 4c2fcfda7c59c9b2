"""Deaths of the ranks, by traces: no token is lost or made twice, rows that kill are found, and no other is."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from shoal.driver.draft import SchedulerLimits
from shoal.driver.healing import LONGEST_WAIT_S, Restarts, StepSizes
from shoal.driver.request import Trust
from shoal.driver.scheduler import Scheduler


@pytest.fixture(scope="module")
def traces():
    """The module of the scheduler's own traces."""
    spec = importlib.util.spec_from_file_location("traces", Path(__file__).parent / "test_scheduler.py")
    sys.modules["traces"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["traces"]


class Run:
    """The driver's loop, with ranks that die: at given iterations, and whenever a killer gets to its position."""

    def __init__(self, traces, limits, requests, killers=None, deaths=(), lookahead=2):
        self.scheduler = Scheduler(limits)
        self.traces, self.limits, self.killers, self.deaths = traces, limits, killers or {}, set(deaths)
        self.ranks = traces.FakeRanks(limits)
        self.inflight, self.ended, self.epoch, self.num_deaths, self.iterations = [], {}, 0, 0, 0
        self.solo = []  # numbers of rows that were alone when the ranks died
        for request in requests:
            self.scheduler.add(request)
        self.lookahead = lookahead

    def kills(self, plan):
        """A killer kills when the token at its position is computed."""
        return any(
            request.num_computed_tokens > self.killers[request.source.number] + len(request.source.prompt_token_ids)
            for request in plan.requests
            if request.source.number in self.killers
        )

    def step(self):
        scheduler = self.scheduler
        while len(self.inflight) <= self.lookahead and (plan := scheduler.schedule()) is not None:
            self.inflight.append(plan)
        finished = scheduler.take_ended()
        if self.inflight and (self.iterations in self.deaths or self.kills(self.inflight[0])):
            self.die()
        elif self.inflight:
            plan = self.inflight.pop(0)
            finished += scheduler.update(plan, self.ranks.execute(plan))
        finished += scheduler.take_ended()
        for request in finished:
            assert request.source.number not in self.ended
            self.ended[request.source.number] = request
        scheduler.kv.pool.check()
        self.iterations += 1

    def die(self):
        self.num_deaths += 1
        self.epoch += 1
        lost = {id(r): r for plan in self.inflight for r in plan.requests if not r.finished}
        tried = self.scheduler.suspects.died(list(lost.values()))
        self.solo += [request.source.number for request, alone in tried if alone]
        guilty = self.scheduler.suspects.take_guilty()
        self.scheduler.lose_ranks(self.inflight)
        self.inflight.clear()
        for request in guilty:
            self.scheduler.fail(request, "engine_killed", "it killed")
        self.ranks = self.traces.FakeRanks(self.limits)
        self.scheduler.restart(self.epoch << 32, self.limits.num_blocks)

    def to_the_end(self, most=5000):
        while self.scheduler.num_unfinished or self.inflight:
            self.step()
            assert self.iterations < most, f"{self.scheduler.num_unfinished} never ended"
        assert self.scheduler.kv.pool.num_used == 0
        assert self.scheduler.suspects.may_enter(object()), "nobody is under suspicion any more"
        return self


def make(traces, rng, count, max_model_len=64):
    requests = []
    for number in range(count):
        prompt = [rng.randrange(2, 12) for _ in range(rng.randrange(1, max_model_len // 2))]
        requests.append(traces.make_request(number, prompt, rng.randrange(1, 30), priority=rng.randrange(3)))
    return requests


@pytest.mark.parametrize("seed", range(40))
def test_random_deaths_change_no_token(traces, seed):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    num_blocks = rng.randrange(64 // block_size, 400 // block_size + 2)
    limits = SchedulerLimits(
        64, rng.randrange(1, 9), rng.randrange(8, 64), num_blocks, block_size,
        rng.choice([1, 4]), enable_prefix_caching=rng.random() < 0.7, use_priority=rng.random() < 0.5,
    )  # fmt: skip
    requests = make(traces, rng, 20)
    killers = {number: rng.randrange(0, 4) for number in rng.sample(range(20), rng.randrange(0, 3))}
    deaths = {rng.randrange(60) for _ in range(rng.randrange(0, 4))}
    run = Run(traces, limits, requests, killers, deaths, rng.randrange(0, 4)).to_the_end()
    assert set(run.ended) == set(range(20))
    for request in requests:
        result = run.ended[request.number]
        output, reason = traces.expected_output(request, limits.max_model_len)
        got = result.token_ids[result.num_prompt_tokens :]
        assert got == output[: len(got)], "tokens that were known are kept, and go on as if nothing had been"
        if result.finish_reason == "error":
            assert request.number in killers
            assert run.solo.count(request.number) == 3
        elif request.number in killers:
            assert len(got) <= killers[request.number] + limits.decode_burst, "it ended before it could kill"
        elif len(got) < len(output):
            assert len(got) + result.num_prompt_tokens > limits.num_blocks * block_size - 1, "the cache was its own"
        else:
            assert (got, result.finish_reason) == (output, reason)


def test_a_killer_among_many_costs_five_deaths(traces):
    """One death with all, one with a few, three alone; rows that get past the place they died at are free again."""
    limits = SchedulerLimits(64, 100, 4000, 2000, 4, 4)
    requests = [traces.make_request(i, [5] * 8 + [2 + i % 9, 3], 30) for i in range(100)]
    for request in requests:
        request.stop_ids = ()
    run = Run(traces, limits, requests, {71: 6}).to_the_end()
    assert run.num_deaths == 5
    assert [n for n, r in run.ended.items() if r.finish_reason == "error"] == [71]
    assert run.solo == [71] * 3
    assert run.iterations < 150, "rows are not run to their ends in small groups"


def test_a_lost_machine_is_held_against_nobody(traces):
    limits = SchedulerLimits(64, 50, 4000, 2000, 4, 1)
    requests = [traces.make_request(i, [5, 4, 2 + i % 9], 20) for i in range(50)]
    run = Run(traces, limits, requests, deaths={9}, lookahead=0)
    for _ in range(10):
        run.step()
    suspects = [r for _, _, _, r in run.scheduler._waiting._heap if r.trust is Trust.GROUP]
    assert suspects
    run.to_the_end()
    assert run.num_deaths == 1
    assert run.solo == []
    assert all(r.finish_reason != "error" for r in run.ended.values())


def test_solo_deaths_of_an_earlier_life_count(traces):
    limits = SchedulerLimits(64, 8, 64, 100, 4, 1)
    requests = [traces.make_request(i, [5, 4, 2 + i], 20) for i in range(6)]
    requests[4].num_solo_deaths = 2
    run = Run(traces, limits, requests, {4: 1}).to_the_end()
    assert run.num_deaths == 1
    assert run.ended[4].finish_reason == "error"
    assert next(iter(run.ended)) == 4, "it ran before all others"


def test_restarts_are_bounded_and_forgiven():
    restarts = Restarts(3, 0.5)
    assert [restarts.next_wait() for _ in range(4)] == [0.0, 0.5, 1.0, None]
    restarts.progress()
    assert restarts.next_wait() == 0.0
    assert restarts.total == 4
    many = Restarts(100, 0.5)
    assert max(many.next_wait() for _ in range(100)) == LONGEST_WAIT_S


def test_steps_shrink_and_grow_again():
    sizes = StepSizes(256, 2048, 1)
    assert sizes.shrink(200, 1000)
    assert sizes.now == (100, 500)
    assert sizes.shrink(1, 400)
    assert sizes.now == (100, 200), "a lone row's step gets shorter"
    assert not sizes.shrink(1, 16)
    assert sizes.now == (256, 2048), "it is the row that cannot fit"
    assert sizes.shrink(64, 64)
    steps = 0
    while sizes.now != (256, 2048):
        steps += 1
        sizes.good()
        assert steps < 5000
    assert steps > 3 * StepSizes.PATIENCE, "the more often it failed, the longer it waits"
    whole_prompts = StepSizes(8, 512, 512)
    assert whole_prompts.shrink(4, 300)
    assert whole_prompts.now == (2, 512)
    assert not whole_prompts.shrink(1, 300)
