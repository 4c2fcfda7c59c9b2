"""The scheduler and the block manager by traces: no leak, no block used twice, budgets kept, every request ends."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.driver.block_pool import BlockPool
from shoal.driver.draft import Plan, SchedulerLimits
from shoal.driver.params import SamplingParams
from shoal.driver.request import EngineRequest
from shoal.driver.scheduler import Scheduler
from shoal.workers.plan import SchedulerOutput, StepOutput

EOS = 1
NEVER = 12  # no token


class FakeRanks:
    """Executes plans as ranks would, on integers: checks what they say and 'samples' a hash of the row's tokens."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.prompt_len: dict[int, int] = {}
        self.stop: dict[int, tuple[tuple[int, ...], int]] = {}
        self.ended: dict[int, bool] = {}
        self.tables: dict[int, dict[int, int]] = {}
        self.contents: dict[int, list[int | None]] = {}  # block -> token written in each slot

    def execute(self, plan: Plan) -> StepOutput:
        out = SchedulerOutput.decode(plan.output.encode())
        assert int(out.num_scheduled_tokens.sum()) <= self.limits.max_num_batched_tokens
        assert len(out.rows) == len(set(out.rows.tolist())) <= self.limits.max_num_seqs
        for new in out.new_rows:
            self.tokens[new.row] = new.token_ids.tolist()
            self.computed[new.row] = new.num_computed_tokens
            self.prompt_len[new.row] = new.num_prompt_tokens
            self.stop[new.row] = (new.sampling.stop_ids, new.sampling.min_tokens)
            self.ended[new.row] = False
            self.tables[new.row] = {}
        for row, index, block in zip(out.block_rows, out.block_positions, out.block_ids, strict=True):
            self.tables[int(row)][int(index)] = int(block)
        lines: dict[int, list[int]] = {int(row): [] for row in out.rows}
        assert out.num_steps == 1 or all(out.num_scheduled_tokens == 1)
        for step in range(out.num_steps):
            taking = [
                (int(row), int(count) if step == 0 else 1, samples)
                for row, count, samples, steps in zip(
                    out.rows, out.num_scheduled_tokens, out.samples, out.row_steps, strict=True
                )
                if step < steps and not self.ended[int(row)]
            ]
            for row, _, _ in taking if out.rows_decode_apart else ():  # before any other row has written
                self._read(row)
            for row, count, _ in taking:  # a pass writes the KV of all its tokens before any row reads
                self._write(row, count)
            for row, _, samples in taking:
                self._read(row)
                if samples:
                    lines[row].append(self._sample(row))
        sampled = [lines[int(row)] for row, samples in zip(out.rows, out.samples, strict=True) if samples]
        sampled = [line + [-1] * (out.num_steps - len(line)) for line in sampled]
        ids = np.array(sampled, np.int32).reshape(len(sampled), out.num_steps)
        return StepOutput.decode(StepOutput(out.step_id, ids).encode())

    def _prefix_id(self, row: int, position: int) -> int:
        return hash(tuple(self.tokens[row][: position + 1]))

    def _write(self, row: int, count: int) -> None:
        for position in range(self.computed[row], self.computed[row] + count):
            assert position < len(self.tokens[row]), "a token was scheduled before it exists"
            block = self.tables[row][position // self.limits.block_size]
            slots = self.contents.setdefault(block, [None] * self.limits.block_size)
            slots[position % self.limits.block_size] = self._prefix_id(row, position)
        self.computed[row] += count

    def _read(self, row: int) -> None:
        """All the row attends to is there: prefix hits hold what they stand for, and nobody overwrote anything."""
        for position in range(self.computed[row]):
            block = self.tables[row][position // self.limits.block_size]
            assert self.contents[block][position % self.limits.block_size] == self._prefix_id(row, position)

    def _sample(self, row: int) -> int:
        assert self.computed[row] == len(self.tokens[row])
        token = next_token(self.tokens[row])
        self.tokens[row].append(token)
        stop_ids, min_tokens = self.stop[row]
        self.ended[row] = token in stop_ids and len(self.tokens[row]) - self.prompt_len[row] >= min_tokens
        return token


def next_token(tokens: list[int]) -> int:
    return random.Random(str(tokens)).randrange(12)  # 1 in 12 is EOS


def expected_output(request: EngineRequest, max_model_len: int) -> tuple[list[int], str]:
    tokens = list(request.prompt_token_ids)
    output: list[int] = []
    while True:
        output.append(next_token(tokens))
        tokens.append(output[-1])
        if len(output) >= request.params.min_tokens and output[-1] in request.stop_ids:
            return output, "stop"
        if len(output) == request.params.max_tokens or len(tokens) == max_model_len:
            return output, "length"


def make_request(number: int, prompt: list[int], max_tokens: int, **more: object) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, min_tokens=more.pop("min_tokens", 0))
    return EngineRequest(number, prompt, params, stop_ids=(EOS,), eos_ids=(EOS,), **more)


def drive(scheduler: Scheduler, ranks: FakeRanks, lookahead: int, events: dict[int, list], most: int = 20000) -> dict:
    """The driver's loop over a trace of events {iteration: [request or number to abort]}; returns what ended."""
    inflight: list[Plan] = []
    ended: dict[int, object] = {}
    pool = scheduler.kv.pool
    for iteration in range(most):
        for event in events.pop(iteration, []):
            if isinstance(event, EngineRequest):
                scheduler.add(event)
            else:
                scheduler.abort([event])
        while len(inflight) <= lookahead and (plan := scheduler.schedule()) is not None:
            inflight.append(plan)
        finished = scheduler.take_ended()
        if inflight:
            plan = inflight.pop(0)
            finished += scheduler.update(plan, ranks.execute(plan))
        for request in finished:
            assert request.source.number not in ended, "a request ended twice"
            assert not request.block_table
            ended[request.source.number] = request
        pool.check()
        assert pool.num_free + pool.num_used == pool.num_blocks
        held = [b for r in scheduler.running for b in r.block_table]
        assert pool.num_used == len(set(held))
        if not events and not inflight and not scheduler.num_unfinished:
            assert pool.num_used == 0
            return ended
    raise AssertionError(f"{scheduler.num_unfinished} requests never ended")


@st.composite
def traces(draw: st.DrawFn) -> tuple[SchedulerLimits, int, dict[int, list], list[EngineRequest], set[int]]:
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    max_model_len = draw(st.integers(8, 48))
    limits = SchedulerLimits(
        max_model_len=max_model_len,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(6, 40)),
        num_blocks=draw(st.integers(-(-max_model_len // block_size), 4 * max_model_len // block_size + 2)),
        block_size=block_size,
        decode_burst=draw(st.sampled_from([1, 2, 8])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 3])),
        enable_prefix_caching=draw(st.booleans()),
        use_priority=draw(st.booleans()),
        num_lanes=draw(st.sampled_from([1, 1, 2, 3])),
    )
    events: dict[int, list] = {}
    requests, aborted = [], set()
    common = draw(st.lists(st.integers(0, 11), min_size=0, max_size=max_model_len // 2))
    for number in range(draw(st.integers(1, 14))):
        own = draw(st.lists(st.integers(0, 11), min_size=1, max_size=max_model_len // 2 - 1))
        prompt = (common if draw(st.booleans()) else []) + own
        max_tokens = draw(st.integers(1, 40))
        request = make_request(
            number,
            prompt,
            max_tokens,
            min_tokens=draw(st.integers(0, min(3, max_tokens))),
            priority=draw(st.integers(0, 2)),
        )
        requests.append(request)
        at = draw(st.integers(0, 30))
        events.setdefault(at, []).append(request)
        if draw(st.integers(0, 5)) == 0:
            aborted.add(number)
            events.setdefault(at + draw(st.integers(0, 20)), []).append(number)
    return limits, draw(st.integers(0, 3)), events, requests, aborted


@settings(max_examples=200, deadline=None)
@given(traces())
def test_random_traces(trace) -> None:
    limits, lookahead, events, requests, aborted = trace
    scheduler = Scheduler(limits)
    ended = drive(scheduler, FakeRanks(limits), lookahead, events)
    assert set(ended) == {r.number for r in requests}
    for request in requests:
        result = ended[request.number]
        output, reason = expected_output(request, limits.max_model_len)
        got = result.token_ids[result.num_prompt_tokens :]
        if result.finish_reason == "abort":
            assert request.number in aborted
            assert got == output[: len(got)]
        elif result.finish_reason == "length" and len(got) < len(output):  # alone, and the cache was its own
            assert len(got) + len(request.prompt_token_ids) > limits.num_blocks * limits.block_size - 1
            assert got == output[: len(got)]
        else:
            assert (got, result.finish_reason) == (output, reason)
            assert result.stop_reason is None


def limits(**changes: object) -> SchedulerLimits:
    values = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64, "num_blocks": 64, "block_size": 4}
    return SchedulerLimits(**(values | changes))


def long_request(number: int, prompt: list[int], max_tokens: int, **more: object) -> EngineRequest:
    """Never ends by EOS."""
    request = make_request(number, prompt, max_tokens, **more)
    request.stop_ids = request.eos_ids = ()
    return request


def run(lim: SchedulerLimits, requests: list[EngineRequest], lookahead: int = 2) -> tuple[Scheduler, dict]:
    scheduler = Scheduler(lim)
    return scheduler, drive(scheduler, FakeRanks(lim), lookahead, {0: list(requests)})


@pytest.mark.parametrize("known", [False, True], ids=["may stop", "known length"])
def test_preemption_loses_nothing_and_known_lengths_need_none(known) -> None:
    requests = [long_request(i, [i + 2] * 8, 24) for i in range(4)]
    for request in () if known else requests:
        request.stop_ids = (NEVER,)
    scheduler, ended = run(limits(num_blocks=12), requests)
    assert (scheduler.stats.num_preemptions == 0) == known
    for request in requests:
        assert ended[request.number].token_ids[8:] == expected_output(request, 64)[0]


def test_prompt_larger_than_the_cache_is_refused_with_the_number_that_fits() -> None:
    _, ended = run(limits(num_blocks=5), [make_request(0, [3] * 21, 4), long_request(1, [3] * 10, 4)])
    assert ended[0].finish_reason == "error"
    assert "21 tokens" in ended[0].stop_text
    assert "longest prompt that fits has 20 tokens" in ended[0].stop_text
    assert ended[1].finish_reason == "length"
    assert len(ended[1].token_ids) == 14


def test_alone_and_out_of_blocks_ends_with_length() -> None:
    _, ended = run(limits(num_blocks=3), [long_request(0, [5] * 10, 40)])
    assert ended[0].finish_reason == "length"
    assert len(ended[0].token_ids) == 13  # 12 slots, and the last token needs none


def test_prefix_hits_are_whole_blocks_and_leave_a_token_to_compute() -> None:
    prompt = list(range(2, 10))
    scheduler = Scheduler(limits())
    ranks = FakeRanks(scheduler.limits)
    drive(scheduler, ranks, 2, {0: [long_request(0, prompt, 2)]})
    ended = drive(scheduler, ranks, 2, {0: [long_request(1, prompt, 2), long_request(2, [*prompt, 3, 4], 2)]})
    assert ended[1].num_cached_tokens == 4
    assert ended[2].num_cached_tokens == 8


def test_cache_salt_keeps_prefixes_apart() -> None:
    lim = limits()
    scheduler, ranks = Scheduler(lim), FakeRanks(lim)
    drive(scheduler, ranks, 0, {0: [long_request(0, [4] * 9, 1, cache_salt="a")]})
    ended = drive(
        scheduler,
        ranks,
        0,
        {0: [long_request(1, [4] * 9, 1, cache_salt="b"), long_request(2, [4] * 9, 1, cache_salt="a")]},
    )
    assert ended[1].num_cached_tokens == 0
    assert ended[2].num_cached_tokens == 8


def test_eviction_takes_the_least_recently_used_prefix() -> None:
    lim = limits(num_blocks=9, max_num_seqs=1)
    scheduler, ranks = Scheduler(lim), FakeRanks(lim)

    def hit(number: int, token: int) -> int:
        return drive(scheduler, ranks, 0, {0: [long_request(number, [token] * 9, 1)]})[number].num_cached_tokens

    assert [hit(0, 5), hit(1, 6), hit(2, 7)] == [0, 0, 0]  # two full blocks each: 6 cached, 3 plain
    assert hit(3, 5) == 8  # still there, and now the most recent
    assert hit(4, 8) == 0  # takes the plain blocks
    assert hit(5, 9) == 0  # evicts 6, the oldest
    assert hit(6, 6) == 0
    assert hit(7, 5) == 8


def test_chunked_prefill_respects_the_budget_and_mixes_with_decodes() -> None:
    lim = limits(max_num_batched_tokens=8, enable_prefix_caching=False)
    scheduler = Scheduler(lim)
    scheduler.add(long_request(0, [3] * 4, 30))
    first = scheduler.schedule()
    scheduler.update(first, StepOutput(first.output.step_id, np.array([[5]], np.int32)))
    scheduler.add(long_request(1, [4] * 20, 4))
    plan = scheduler.schedule()
    assert plan.output.num_scheduled_tokens.tolist() == [1, 7]
    assert plan.output.samples.tolist() == [1, 0]


def test_no_chunking_waits_for_a_whole_budget() -> None:
    lim = limits(max_num_batched_tokens=64, enable_chunked_prefill=False, max_model_len=64)
    scheduler = Scheduler(lim)
    scheduler.add(long_request(0, [3] * 40, 4))
    scheduler.add(long_request(1, [4] * 40, 4))
    assert scheduler.schedule().output.num_scheduled_tokens.tolist() == [40]


def test_priority_order_and_fcfs_ignores_it() -> None:
    for use_priority, order in ((True, [2, 1, 0]), (False, [0, 1, 2])):
        scheduler = Scheduler(limits(max_num_seqs=1, use_priority=use_priority))
        for number, priority in ((0, 5), (1, 3), (2, -1)):
            scheduler.add(long_request(number, [3 + number] * 3, 1, priority=priority))
        seen = []
        while scheduler.num_unfinished:
            plan = scheduler.schedule()
            seen += [
                r.source.number
                for r in scheduler.update(plan, StepOutput(plan.output.step_id, np.array([[5]], np.int32)))
            ]
        assert seen == order


def test_bursts_only_when_everything_decodes() -> None:
    scheduler = Scheduler(limits(decode_burst=8))
    scheduler.add(long_request(0, [3] * 4, 30))
    plan = scheduler.schedule()
    assert plan.output.num_steps == 1
    plan2 = scheduler.schedule()
    assert plan2.output.num_steps == 8
    assert scheduler.num_plans_inflight == 2
    scheduler.add(long_request(1, [4] * 4, 4))
    assert scheduler.schedule().output.num_steps == 1


def test_lanes_take_turns_and_stay_even() -> None:
    """As pipeline stages want it: the next plan has no row of the one before, and lanes have equally many."""
    scheduler = Scheduler(limits(num_lanes=2, max_num_seqs=8, decode_burst=1))
    ranks = FakeRanks(scheduler.limits)
    for number in range(6):
        scheduler.add(long_request(number, [2, 3, 4], 12))
    plans: list[Plan] = []
    while len(plans) < 9:
        flight = [plan for _ in range(3) if (plan := scheduler.schedule()) is not None]
        assert len(flight) == 3
        for plan in flight:
            scheduler.update(plan, ranks.execute(plan))
        plans += flight
    assert {len(plan.requests) for plan in plans} == {3}
    for plan, following in itertools.pairwise(plans):
        assert not set(plan.requests) & set(following.requests)


def test_burst_ends_where_max_tokens_does() -> None:
    scheduler = Scheduler(limits(decode_burst=8))
    for number, max_tokens in ((0, 4), (1, 20)):
        scheduler.add(long_request(number, [3 + number] * 4, max_tokens))
    scheduler.schedule()
    plan = scheduler.schedule()
    assert plan.output.row_steps.tolist() == [3, 8]
    assert (scheduler.stats.num_steps, scheduler.stats.num_row_steps) == (1 + 8, 2 + 3 + 8)


def test_abort_in_flight_frees_only_when_the_plan_is_back() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(long_request(0, [3] * 4, 30))
    plan = scheduler.schedule()
    scheduler.abort([0])
    assert scheduler.kv.pool.num_used == 1
    assert scheduler.take_ended() == []
    (request,) = scheduler.update(plan, StepOutput(plan.output.step_id, np.array([[5]], np.int32)))
    assert request.finish_reason == "abort"
    assert scheduler.kv.pool.num_used == 0


def test_reset_refuses_while_blocks_are_held() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(long_request(0, [3] * 9, 2))
    plan = scheduler.schedule()
    assert not scheduler.kv.reset()
    scheduler.abort([0])
    scheduler.update(plan, StepOutput(plan.output.step_id, np.array([[5]], np.int32)))
    assert scheduler.kv.reset()
    request = scheduler.add(long_request(1, [3] * 9, 2))
    assert scheduler.kv.find_prefix(request) == []


def test_pool_refuses_a_double_release() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)
