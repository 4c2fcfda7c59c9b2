"""The scheduler: who computes how many tokens in the next step. Integers only; no tensors.

There is no prefill phase and no decode phase: every running request has `num_computed_tokens` that chases the tokens
it has. One rule covers chunked prefill, prefix hits, preemption and resumption. Plans are made ahead of results: tokens
that plans in flight will sample count as `num_inflight_tokens`, and nothing a plan in flight uses is taken away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from shoal.driver.block_pool import KVCacheManager
from shoal.driver.draft import Draft, Plan, SchedulerLimits, SchedulerStats
from shoal.driver.forecast import Admission
from shoal.driver.request import EngineRequest, Request, RequestStatus
from shoal.driver.suspects import Suspects
from shoal.driver.waiting import WaitingQueue
from shoal.workers.plan import NewRow, StepOutput, TokenLogprobs

# StopCheck(request, token) -> whether a stop string ended it; it then has set stop_reason and stop_text.
StopCheck = Callable[[Request, int], bool]


class Scheduler:
    """Queue, running rows and their blocks. One thread calls it."""

    def __init__(self, limits: SchedulerLimits, stop_check: StopCheck | None = None, solo_deaths: int = 3) -> None:
        self.limits = limits
        self.suspects = Suspects(solo_deaths)
        self.kv = KVCacheManager(limits.num_blocks, limits.block_size, limits.enable_prefix_caching)
        self.stats = SchedulerStats()
        self.running: list[Request] = []  # in order of admission
        self.num_plans_inflight = 0
        self._stop_check = stop_check
        self._waiting = WaitingQueue(limits.use_priority, self.suspects)
        self._requests: dict[int, Request] = {}
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._ended: list[Request] = []  # ended outside update(): aborted, refused, alone and out of blocks
        self._lane = 0  # whose turn it is
        self._lane_sizes = [0] * limits.num_lanes  # running rows of each
        self._drain = False  # a preemption waits for the plans in flight
        self._admission = Admission()
        self._next_step = 0

    # ---- what comes in -----------------------------------------------------------------------------------------

    def add(self, source: EngineRequest) -> Request:
        """Queue a request. One whose prompt can never fit the cache ends at once, with finish_reason "error"."""
        limits = self.limits
        prompt = source.prompt_token_ids
        request = Request.begin(source, limits.max_model_len)
        request.stop_text = limits.refusal(len(prompt))
        if request.stop_text is not None:
            request.finish_reason, request.status = "error", RequestStatus.FINISHED
            self._ended.append(request)
            return request
        assert len(prompt) < request.max_total_tokens
        self._requests[source.number] = request
        self.stats.num_prompt_tokens += len(prompt)
        self.stats.max_unfinished = max(self.stats.max_unfinished, len(self._requests))
        self.suspects.enter(request)
        self._waiting.push(request)
        return request

    def abort(self, numbers: Iterable[int]) -> None:
        """End these requests with finish_reason "abort"; numbers already gone are passed over."""
        for number in numbers:
            request = self._requests.get(number)
            if request is not None and not request.finished:
                request.finish_reason = "abort"
                self._finish_if_idle(request, self._ended)

    def preempt_all(self) -> None:
        """Send every running request back to the queue; no plan may be in flight."""
        assert not self.num_plans_inflight
        for request in list(self.running):
            self._preempt(request)

    def lose_ranks(self, plans: Iterable[Plan]) -> None:
        """Ranks and KV are gone, with the plans in flight. Tokens are kept; every request goes back to the queue."""
        self.num_plans_inflight, self._drain = 0, False
        for plan in plans:
            plan.forget()
        for request in list(self.running):
            request.prompt_logprobs.clear()  # their prompt is computed again, in other chunks
            self._finish_if_idle(request, self._ended)
            if not request.finished:
                self._preempt(request)
        self._waiting.sort_again(self._requests.values())  # trust has changed, and the order with it

    def restart(self, first_step: int | None, num_blocks: int) -> None:
        """There are ranks again, with an empty cache. `first_step`: the id of new ones' first step."""
        self._next_step = self._next_step if first_step is None else first_step
        self.limits = replace(self.limits, num_blocks=num_blocks)
        self.kv = self.kv.emptied(num_blocks)

    def fail(self, request: Request, code: str, message: str) -> None:
        """End a request that has no plan in flight with an error."""
        request.finish_reason, request.error_code, request.stop_text = "error", code, message
        self._finish_if_idle(request, self._ended)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not been handed back."""
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._requests) - len(self.running)

    def unfinished_numbers(self) -> list[int]:
        """Numbers of all requests not handed back."""
        return list(self._requests)

    def take_ended(self) -> list[Request]:
        """Requests that ended other than by a result, each given once."""
        ended, self._ended = self._ended, []
        return ended

    # ---- schedule ----------------------------------------------------------------------------------------------

    def schedule(self) -> Plan | None:
        """The next step, or None if there is nothing to run before a result comes back."""
        if self._drain and self.num_plans_inflight:
            return None
        self._drain = False
        if self.suspects.solo is not None and not self._clear_for(self.suspects.solo):
            return None
        for _ in self._lane_sizes:
            draft = Draft()
            budget = self._schedule_running(draft, self.limits.max_num_batched_tokens)
            if not self._drain:
                self._schedule_waiting(draft, budget)
            self._lane = (self._lane + 1) % self.limits.num_lanes
            if draft.requests:
                return self._seal(draft)
            if self._drain:
                break
        return None

    def _clear_for(self, solo: Request) -> bool:
        """Send all others back to the queue; False while plans in flight forbid it."""
        for request in [request for request in self.running if request is not solo]:
            if self.num_plans_inflight:
                return False
            self._preempt(request)
        return True

    def _schedule_running(self, draft: Draft, budget: int) -> int:
        num_steps = self._burst_length()
        preempted = False
        for request in list(self.running):
            if budget == 0:
                break
            if request.status is not RequestStatus.RUNNING or request.finished or request.lane != self._lane:
                continue  # preempted above, or ended and waiting for its plans; or of a lane whose turn it is not
            count = min(self._pending(request), budget)
            if count == 0:
                continue
            if self.limits.long_prefill_token_threshold:
                count = min(count, self.limits.long_prefill_token_threshold)
            steps = min(num_steps, request.max_total_tokens - request.num_tokens - request.num_inflight_tokens)
            if not self._make_room(request, request.num_computed_tokens + count + steps - 1, draft):
                if self._drain:
                    break
                preempted = True
                continue
            self._put(draft, request, count, steps)
            budget -= count
        return 0 if preempted else budget

    def _schedule_waiting(self, draft: Draft, budget: int) -> None:
        limits = self.limits
        self._admission.look(self.kv)
        while budget and len(self.running) < limits.max_num_seqs and self._lane_has_room():
            request = self._waiting.head()
            if request is None:
                return
            hits = self.kv.find_prefix(request)
            num_cached = len(hits) * limits.block_size
            count = request.num_tokens - num_cached
            if limits.long_prefill_token_threshold:
                count = min(count, limits.long_prefill_token_threshold)
            if count > budget and not limits.enable_chunked_prefill:
                return
            if not self.kv.can_admit(request, hits) or not self._admission.lets_in(request, num_cached, self.running):
                return
            self._waiting.pop()
            self._admit(draft, request, hits, num_cached)
            count = min(count, budget)
            allocated = self.kv.allocate(request, num_cached + count)
            assert allocated
            self._put(draft, request, count, 1)
            budget -= count

    def _lane_has_room(self) -> bool:
        """Lanes stay even, so that every pipeline stage finds rows whose tokens are not still being sampled."""
        return self._lane_sizes[self._lane] < -(-len(self._requests) // self.limits.num_lanes)

    def _burst_length(self) -> int:
        """Steps to grant: more than one only while every row decodes and nobody can be let in."""
        most = self.limits.decode_burst
        pending = [(request, self._pending(request)) for request in self.running]
        if most == 1 or any(count > 1 for _, count in pending):
            return 1
        head = self._waiting.head()
        if head is not None:
            room = len(self.running) < self.limits.max_num_seqs and not self._admission.crowded
            if room and self.kv.can_admit(head, self.kv.find_prefix(head)):
                return 1
            most = max(1, most // 4)  # a finished row's place should not stay empty for long
        rows = [request for request, count in pending if count]
        free, size = self.kv.pool.num_free, self.limits.block_size
        while most > 1 and len(rows) * (most // size + 1) > free:  # else there is room whatever the tables look like
            if sum(self.kv.missing(r, min(r.num_computed_tokens + most, r.max_total_tokens)) for r in rows) <= free:
                break
            most //= 2
        return most

    def _pending(self, request: Request) -> int:
        """Tokens it has, or will have by plans in flight, whose KV is not computed or planned."""
        if request.finished:
            return 0
        total = request.num_tokens + request.num_inflight_tokens
        return 0 if total >= request.max_total_tokens else total - request.num_computed_tokens

    def _make_room(self, request: Request, num_tokens: int, draft: Draft) -> bool:
        """Blocks for the request, by preempting others if need be. False: it was preempted or ended itself, or a
        victim has plans in flight and everything must wait for them (`_drain`)."""
        while not self.kv.allocate(request, num_tokens):
            victim = self._victim()
            if victim.num_plans_inflight or victim in draft.requests:
                self._drain = True
                return False
            if victim is request and len(self.running) == 1:
                request.finish_reason = "length"  # alone, and the whole cache is its own
                self._finish_if_idle(request, self._ended)
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _victim(self) -> Request:
        if self.limits.use_priority:
            return max(self.running, key=lambda r: (r.source.priority, r.source.number))
        return self.running[-1]

    def _preempt(self, request: Request) -> None:
        """Back to the queue; its tokens are kept and computed again when it returns."""
        self._leave(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.stats.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._waiting.push(request)

    def _admit(self, draft: Draft, request: Request, hits: list[int], num_cached: int) -> None:
        self.kv.admit(request, hits)
        request.row = self._free_rows.pop()
        request.lane = self._lane
        self._lane_sizes[self._lane] += 1
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_cached
        if not request.stats.scheduled_ts:
            request.stats.scheduled_ts = time.time()
            request.num_cached_tokens = num_cached
            self.stats.num_cached_prompt_tokens += num_cached
        self.running.append(request)
        draft.new_rows.append(
            NewRow(
                request.row,
                np.array(request.token_ids, np.int32),
                request.num_prompt_tokens,
                num_cached,
                request.source.row_sampling(),
            )
        )

    def _put(self, draft: Draft, request: Request, count: int, steps: int) -> None:
        """Plan `count` tokens of the request and, where they reach its newest token, `steps` samples."""
        known = request.num_computed_tokens + count
        samples = known == request.num_tokens + request.num_inflight_tokens
        draft.put(request, count, samples, steps if samples else 1)
        request.num_plans_inflight += 1
        request.num_computed_tokens = known
        if samples:
            request.num_inflight_tokens += steps
            request.num_computed_tokens += steps - 1
        assert len(request.block_table) * self.limits.block_size >= request.num_computed_tokens
        self.kv.remember(request)

    def _seal(self, draft: Draft) -> Plan:
        plan = draft.seal(self._next_step)
        self._next_step += 1
        self.num_plans_inflight += 1
        self.stats.num_steps += plan.output.num_steps
        self.stats.num_row_steps += sum(draft.steps)
        self.stats.num_scheduled_tokens += sum(draft.counts)
        return plan

    # ---- update ------------------------------------------------------------------------------------------------

    def update(self, plan: Plan, output: StepOutput) -> list[Request]:
        """Take a step's results, in the order of plans; returns the requests that ended and hold nothing any more."""
        assert output.step_id == plan.output.step_id
        self.num_plans_inflight -= 1
        now = time.time()
        finished: list[Request] = []
        sampled = 0
        token_ids = output.token_ids.tolist()
        for index, request in enumerate(plan.requests):
            request.num_plans_inflight -= 1
            if index in output.prompt_logprobs:
                start, entry = output.prompt_logprobs[index]
                request.prompt_logprobs[start] = entry
            if plan.output.samples[index]:
                steps = int(plan.output.row_steps[index])
                request.num_inflight_tokens -= steps
                self._append(request, token_ids[sampled][:steps], output.logprobs.get(sampled), now)
                sampled += 1
            self._finish_if_idle(request, finished)
        return finished

    def _append(self, request: Request, token_ids: list[int], logprobs: TokenLogprobs | None, now: float) -> None:
        """Confirm sampled tokens until one ends the request; those after it are waste."""
        if request.finished:
            self.stats.num_wasted_tokens += sum(t >= 0 for t in token_ids)
            return
        kept = self._confirm(request, token_ids)
        if not request.stats.first_token_ts:
            request.stats.first_token_ts = now
        request.stats.last_token_ts = now
        request.stats.num_generation_tokens += kept
        self.stats.num_generation_tokens += kept
        self.stats.num_wasted_tokens += sum(t >= 0 for t in token_ids[kept:])
        if logprobs is not None:
            request.logprobs.append(TokenLogprobs(logprobs.ids[:kept], logprobs.logprobs[:kept], logprobs.ranks[:kept]))
        if request.trust:
            self.suspects.grown(request)
        if not request.finished:
            self.kv.remember(request)

    def _confirm(self, request: Request, token_ids: list[int]) -> int:
        """Append tokens up to the one that ends the request; how many."""
        source = request.source
        room = request.max_total_tokens - request.num_tokens
        if not source.params.stop and room > len(token_ids) and request.stop_set.isdisjoint(token_ids):
            assert token_ids[-1] >= 0, "the ranks ended a row that the driver did not"
            request.token_ids += token_ids
            return len(token_ids)
        for kept, token in enumerate(token_ids, 1):
            assert token >= 0, "the ranks ended a row that the driver did not"
            request.token_ids.append(token)
            if self._check_stop(request, token):
                return kept
        return len(token_ids)

    def _check_stop(self, request: Request, token: int) -> bool:
        source = request.source
        if token in request.stop_set and request.num_output_tokens >= source.params.min_tokens:
            request.finish_reason = "stop"
            request.stop_reason = None if token in source.eos_ids else token
        elif source.params.stop and self._stop_check is not None and self._stop_check(request, token):
            request.finish_reason = "stop"
        elif request.num_tokens >= request.max_total_tokens:
            request.finish_reason = "length"
        return request.finished

    def _finish_if_idle(self, request: Request, finished: list[Request]) -> None:
        """An ended request gives everything back once no plan in flight uses it."""
        if not request.finished or request.num_plans_inflight or request.status is RequestStatus.FINISHED:
            return
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        self._admission.ended(request)
        request.status = RequestStatus.FINISHED
        del self._requests[request.source.number]
        self.suspects.forget(request)
        finished.append(request)

    # ---- small things ------------------------------------------------------------------------------------------

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._admission.crowded = False
        self.kv.release(request)
        self._free_rows.append(request.row)
        self._lane_sizes[request.lane] -= 1
        request.row = -1
        request.num_granted_blocks = 0
