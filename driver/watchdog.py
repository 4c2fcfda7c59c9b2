"""The watchdog of one gang: it learns of deaths at once, and ends ranks that live but get nowhere.

A thread of the driver's. It looks at two clocks: how long the step in flight has taken, and how long each rank has not
answered a call that only needs its process to run. When one runs out, the stacks of all ranks go to the log and the
ranks are killed, which wakes the step loop wherever it waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

from shoal.driver.log import LOGGER
from shoal.driver.worker_group import StepMemoryError

if TYPE_CHECKING:
    from shoal.driver.worker_group import StepChannel, WorkerGroup

TICK_S = 0.5
SILENT_S = 60.0  # a rank whose process has not answered this long is stopped, or its node is
PING_S = 10.0  # between the answer to one such call and the next
STACKS_S = 5.0  # to tell its stacks, for a rank
FIRST_STEPS = 16


class Watchdog:
    """Watches from its creation until `stop`, or until it has something to tell, which it does once."""

    def __init__(
        self,
        group: WorkerGroup,
        epoch: int,
        limit_s: float,
        first_limit_s: float,
        on_death: Callable[[int, str], None],
    ) -> None:
        """`limit_s`: for a step; `first_limit_s`: for each of the first."""
        self._group, self._epoch, self._on_death = group, epoch, on_death
        self._limit_s, self._first_limit_s = limit_s, first_limit_s
        self._since: float | None = None  # when the oldest plan in flight began to be waited for
        self._num_inflight = self._num_steps = 0
        self._pings: dict[int, tuple[Any, float]] = {}  # by rank: the call, and when it was made
        self._next_ping = 0.0
        self._stop = threading.Event()
        self.verdict: str | None = None
        threading.Thread(target=self._run, name=f"watchdog-{epoch}", daemon=True).start()

    def stop(self) -> None:
        """Say no more."""
        self._stop.set()

    def channel(self, inner: StepChannel) -> StepChannel:
        """The channel, with its traffic noted."""
        return _WatchedChannel(inner, self)

    def sent(self) -> None:
        """A plan is on its way."""
        self._num_inflight += 1
        if self._since is None:
            self._since = time.monotonic()

    def received(self) -> None:
        """A plan's results are here."""
        self._num_inflight -= 1
        self._num_steps += 1
        self._since = time.monotonic() if self._num_inflight else None

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                reason = self._group.wait_for_death(TICK_S) or self._overdue() or self._silent()
            except ray.exceptions.RayError as error:
                reason = f"the ranks cannot be watched: {error}"
            if reason is None or self._stop.is_set():
                continue
            self.verdict = reason
            self._group.give_up()
            self._on_death(self._epoch, reason)
            return

    def _overdue(self) -> str | None:
        since = self._since
        limit_s = self._first_limit_s if self._num_steps < FIRST_STEPS else self._limit_s
        if since is None or time.monotonic() - since < limit_s:
            return None
        lost = self._log_stacks()
        return f"a step did not end within {limit_s:g} s{lost and '; ' + lost}"

    def _silent(self) -> str | None:
        """Asks each rank for a sign of life; who owes one for too long is named."""
        now = time.monotonic()
        if not self._pings and now >= self._next_ping:
            self._pings = {i: (rank.alive.remote(), now) for i, rank in enumerate(self._group.ranks)}
        calls = {call: i for i, (call, _) in self._pings.items()}
        if not calls:
            return None
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in answered:
            del self._pings[calls[call]]
            self._next_ping = now + PING_S
        if all(now - asked < SILENT_S for _, asked in self._pings.values()):
            return None
        lost = self._log_stacks()
        return lost or f"ranks {sorted(self._pings)} did not answer for {SILENT_S:g} s"

    def _log_stacks(self) -> str:
        """All ranks' stacks to the log; who did not tell, in words, else ""."""
        calls = {rank.stacks.remote(): i for i, rank in enumerate(self._group.ranks)}
        told, _ = ray.wait(list(calls), num_returns=len(calls), timeout=STACKS_S)
        silent = []
        for call, rank in calls.items():
            try:
                if call not in told:
                    raise TimeoutError(f"it did not tell its stacks within {STACKS_S:g} s: its process is stopped")
                LOGGER.error("stacks of rank %d, epoch %d:\n%s", rank, self._epoch, ray.get(call))
            except (TimeoutError, ray.exceptions.RayError) as error:
                probe = self._group.probes[rank]
                silent.append(f"rank {rank} (pid {probe['pid']} on {probe['node_ip']}): {error}")
        for line in silent:
            LOGGER.error("no stacks of %s", line)
        return "; ".join(silent)


class _WatchedChannel:
    """A step channel that tells the watchdog of its traffic, and in errors what the watchdog found."""

    def __init__(self, inner: StepChannel, watchdog: Watchdog) -> None:
        self._inner, self._watchdog = inner, watchdog

    def send(self, step_id: int, frame: bytes) -> None:
        """Give every rank the frame."""
        self._watchdog.sent()
        self._inner.send(step_id, frame)

    def receive(self) -> bytes:
        """The next result."""
        try:
            frame = self._inner.receive()
        except StepMemoryError:
            self._watchdog.received()
            raise
        self._watchdog.received()
        return frame

    def abandon(self) -> None:
        """End what waits for it."""
        self._inner.abandon()

    def close(self) -> None:
        """Hang up."""
        self._inner.close()
