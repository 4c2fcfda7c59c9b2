"""What the driver does when ranks die, or run out of memory: make them anew, or make steps smaller."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import ray

from shoal.driver.log import LOGGER
from shoal.driver.placement import PlacementError
from shoal.driver.request import Death
from shoal.driver.worker_group import RankDiedError, StepMemoryError

if TYPE_CHECKING:
    from shoal.driver.config import EngineConfig
    from shoal.driver.draft import Plan
    from shoal.driver.gang import Gang
    from shoal.driver.scheduler import Scheduler

LONGEST_WAIT_S = 30.0


class EngineDeadError(RuntimeError):
    """The engine met an error it cannot go on from; make a new one."""


class Restarts:
    """Restarts in a row. A request that finishes forgives them all."""

    def __init__(self, limit: int, backoff_s: float) -> None:
        self._limit, self._backoff_s = limit, backoff_s
        self.total = 0
        self.in_a_row = 0

    def next_wait(self) -> float | None:
        """Seconds to wait before one more try, which is counted; None when there have been enough."""
        if self.in_a_row == self._limit:
            return None
        self.in_a_row += 1
        self.total += 1
        return 0.0 if self.in_a_row == 1 else min(LONGEST_WAIT_S, self._backoff_s * 2.0 ** (self.in_a_row - 2))

    def refusal(self, what: str, reason: str) -> str:
        """Why there is no further try."""
        return (
            f"{what} died {self.in_a_row + 1} times with no request finished in between "
            f"(max_rank_restarts={self._limit}); the last time: {reason}"
        )

    def progress(self) -> None:
        """A request got its answer."""
        self.in_a_row = 0


class StepSizes:
    """How large a step may be: half after one that did not fit the memory, and double after many that did."""

    LEAST_TOKENS = 16
    PATIENCE = 32  # steps before the first doubling; twice as many after each new failure

    def __init__(self, rows: int, tokens: int, least_tokens: int) -> None:
        self._full = self.now = (rows, tokens)  # most rows, most tokens
        self._least = min(tokens, max(least_tokens, self.LEAST_TOKENS))
        self._patience, self._good = self.PATIENCE, 0

    def shrink(self, rows: int, tokens: int) -> bool:
        """A step of so many did not fit. False: a smaller one cannot be made; what was alone in it is to blame, and
        others need not be held back."""
        self._good = 0
        if rows == 1 and tokens <= self._least:
            self.now = self._full
            return False
        self._patience *= 2
        self.now = rows // 2 if rows > 1 else self.now[0], max(self._least, tokens // 2)
        return True

    def good(self) -> bool:
        """A step did fit. True when steps may be larger from now on."""
        if self.now == self._full:
            return False
        self._good += 1
        if self._good < self._patience:
            return False
        self._good = 0
        self.now = min(self._full[0], self.now[0] * 2), min(self._full[1], self.now[1] * 2)
        return True


_FEW_ROWS = 8  # of a step that did not fit: they are tried alone


class Healer:
    """For the step loop's thread."""

    def __init__(
        self,
        config: EngineConfig,
        gang: Gang,
        scheduler: Scheduler,
        inflight: deque[Plan],
        tell: Callable[[Sequence[Death]], None],
        closing: threading.Event,
    ) -> None:
        self.restarts = Restarts(config.max_rank_restarts, config.restart_backoff_s)
        self._gang, self._scheduler, self._inflight, self._tell, self._closing = (
            gang,
            scheduler,
            inflight,
            tell,
            closing,
        )
        limits = scheduler.limits
        least = 1 if limits.enable_chunked_prefill else limits.max_num_batched_tokens
        self._sizes = StepSizes(limits.max_num_seqs, limits.max_num_batched_tokens, least)

    def heal(self, error: RankDiedError | None) -> None:
        """See that ranks work again, whatever else goes wrong meanwhile."""
        while error is not None:
            try:
                self._heal(error)
                error = None
            except RankDiedError as another:
                error = another

    def _heal(self, error: RankDiedError) -> None:
        """Working ranks again; requests go on from the tokens they have. EngineDeadError after too many tries."""
        began = time.monotonic()
        if isinstance(error, StepMemoryError):
            self._shrink(error)
            if self._in_place():
                return
            reason = str(error)
            self.restarts.progress()  # bounded by itself: each time steps get smaller, or a request ends
        else:
            reason = self._gang.verdict or str(error)
            self._mourn(reason)
        while (wait := self.restarts.next_wait()) is not None:
            if self._closing.wait(wait):
                return
            try:
                resolved = self._gang.rebuild()
            except PlacementError as lack:
                if self._gang.one_of_many:
                    raise EngineDeadError(f"its ranks died, and there is no place for new ones: {lack}") from lack
                reason = str(lack)
                LOGGER.error("%s", reason)
                continue
            except Exception as again:  # whatever it is, the next try may do better, and there are not many
                reason = f"making new ranks failed: {type(again).__name__}: {again}"
                LOGGER.error("%s", reason)
                continue
            self._scheduler.restart(self._gang.first_step, resolved.num_blocks)
            LOGGER.warning("new ranks (epoch %d) after %.1f s", self._gang.epoch, time.monotonic() - began)
            return
        raise EngineDeadError(self.restarts.refusal("the ranks", reason))

    def good_step(self) -> None:
        """A step's results are here."""
        if self._sizes.good():
            self._apply_sizes()

    def _mourn(self, reason: str) -> None:
        """What the ranks had begun is lost: note whose it was, and end the request that has killed often enough."""
        suspects = self._scheduler.suspects
        lost = {id(r): r for plan in self._inflight for r in plan.requests if not r.finished}
        tried = suspects.died(list(lost.values()))
        LOGGER.error("the ranks (epoch %d) died with %d requests in them: %s", self._gang.epoch, len(tried), reason)
        guilty = suspects.take_guilty()
        self._requeue()
        for request in guilty:
            message = (
                f"the engine died {request.num_solo_deaths} times with this row alone in it, and "
                f"{request.num_company_deaths} times with others; the last time: {reason}"
            )
            self._scheduler.fail(request, "engine_killed", message)
        numbers = [(request.source.number, alone) for request, alone in tried]
        self._tell([Death(reason, numbers, [request.source.number for request in guilty])])

    def _requeue(self) -> None:
        self._scheduler.lose_ranks(self._inflight)
        self._inflight.clear()

    def _shrink(self, error: StepMemoryError) -> None:
        """Smaller steps from now on; the request that is alone in one that cannot be smaller ends with an error."""
        plan = next(plan for plan in self._inflight if plan.output.step_id == error.step_id)
        rows, tokens = len(plan.requests), int(plan.output.num_scheduled_tokens.sum())
        smaller = self._sizes.shrink(rows, tokens)
        LOGGER.error("a step of %d rows and %d tokens did not fit the memory; at most %d rows and %d tokens now\n%s",
                     rows, tokens, *self._sizes.now, error)  # fmt: skip
        if 1 < rows <= _FEW_ROWS:
            self._scheduler.suspects.try_alone(plan.requests)
        self._drain(len(self._inflight) - 1)
        self._requeue()
        if not smaller and not plan.requests[0].finished:
            message = f"out of memory in a step of {tokens} tokens with this row alone: {str(error).splitlines()[-1]}"
            self._scheduler.fail(plan.requests[0], "out_of_memory", message)
        self._apply_sizes()

    def _drain(self, count: int) -> None:
        """The other plans in flight were made on what the lost one should have left: their results mean nothing."""
        if self._gang.group.world_size == 1:
            for _ in range(count):
                try:
                    self._gang.channel.receive()
                except StepMemoryError:
                    continue

    def _in_place(self) -> bool:
        """A lone rank goes on: it is told of all requests anew. Ranks that share a step may be stuck in it."""
        if self._gang.group.world_size > 1:
            return False
        try:
            self._gang.group.run("free_memory")
        except ray.exceptions.RayError as error:
            LOGGER.error("the rank did not outlive it: %s", error)
            return False
        self._scheduler.restart(None, self._gang.resolved.num_blocks)
        return True

    def _apply_sizes(self) -> None:
        rows, tokens = self._sizes.now
        self._scheduler.limits = replace(self._scheduler.limits, max_num_seqs=rows, max_num_batched_tokens=tokens)
