"""Rows of many blocks to one engine, and back as they finish. A dead engine is replaced, its rows run again; one that
nobody uses gives back what it holds, and a new one starts with the next rows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from shoal.driver.binding import Binder, Row
from shoal.driver.dispatch import Dispatcher
from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.outcome import brief
from shoal.driver.jobs.work import Work
from shoal.driver.log import LOGGER
from shoal.driver.replica import Down, News, Replica, StartEngine, Up
from shoal.driver.request import Death, EngineRequest, FinishedRequest

_MOST_BOOT_FAILURES = 3
_RETRY_S = 1.0
_END_S = 10.0

Answer = list[FinishedRequest] | Fault


@dataclass(slots=True, eq=False)
class _Group:
    """Rows that were given together."""

    rows: Sequence[Row]
    future: Future[list[Answer]]
    answers: dict[int, Answer] = field(default_factory=dict)


class Pump:
    """One engine's life in a pipeline. `run` may be called on any thread; one thread decides."""

    def __init__(self, start: StartEngine, solo_deaths: int, max_restarts: int, idle_s: float) -> None:
        """Starts the engine and waits for it; raises why it could not be started.

        `idle_s`: after so long without rows the engine ends until there are some again.
        """
        self._start, self._max_restarts, self._idle_s = start, max_restarts, idle_s
        self._resting = False
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._dispatcher: Dispatcher[Work] = Dispatcher(solo_deaths)
        self._replica = Replica(0, start, self._inbox)
        event = self._inbox.get()
        if isinstance(event, Down):
            assert event.error is not None, "nobody stopped it"
            raise event.error
        self.resolved = self._replica.engine.resolved
        self._dispatcher.open_lane(0, self.resolved.max_num_seqs)
        self._binder: Binder
        self._groups: dict[int, tuple[_Group, int]] = {}  # of each row's index: its group and place
        self._sent: dict[int, tuple[Work, int]] = {}  # of each sequence in the engine: its row and child
        self._next_row = self._next_sequence = 0
        self._deaths_in_a_row = self._boot_failures = 0
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pump", daemon=True)

    def open(self, binder: Binder) -> None:
        """`binder` makes requests of rows, within what the engine takes."""
        self._binder = binder
        self._thread.start()

    def run(self, rows: Sequence[Row]) -> Future[list[Answer]]:
        """Answers of the rows, in their order, once all have one. EngineDeadError when no engine will give any."""
        future: Future[list[Answer]] = Future()
        self._inbox.put(_Group(rows, future))
        return future

    def close(self) -> None:
        """Ends the engine and gives back what it holds; rows in it are lost. Waits for that for a while."""
        self._inbox.put(None)
        self._replica.stop()
        if self._replica.is_up:
            self._replica.engine.end_when_silent(_END_S)  # should there be no time left to end it in order
        self._replica.join(_END_S)  # its thread asks Ray, which a process must not leave in the middle of that

    def _run(self) -> None:
        while (event := self._next_event()) is not None:
            try:
                if not self._take(event):
                    return
                self._feed()
            except Exception as error:  # whatever it is, nobody may wait for ever
                LOGGER.exception("the pipeline's engine is given up")
                self._fail(error)

    def _next_event(self) -> Any:
        while 0 in self._dispatcher.lanes and not self._groups:
            try:
                return self._inbox.get(timeout=self._idle_s)
            except Empty:
                LOGGER.info("no rows came for %.0f s: the engine ends, and starts again with the next", self._idle_s)
                self._resting = True
                self._dispatcher.died(0)  # nothing is in it
                self._replica.stop()
        return self._inbox.get()

    def _take(self, event: Any) -> bool:
        """Everything that has come in; False where the end is in it."""
        while event is not None:
            self._handle(event)
            try:
                event = self._inbox.get_nowait()
            except Empty:
                return True
        return False

    def _handle(self, event: Any) -> None:
        if isinstance(event, _Group):
            self._add(event)
        elif isinstance(event, News):
            for death in event.collected.deaths:
                self._ranks_died(death)
            for result in event.collected.finished:
                self._finished(result)
        elif isinstance(event, Up):
            self._boot_failures = 0
            self._dispatcher.open_lane(0, event.replica.engine.resolved.max_num_seqs)
        else:
            assert isinstance(event, Down)
            if event.error is not None and not self._resting:
                self._down(event, event.error)
            self._wake()

    def _wake(self) -> None:
        """Rows came while the engine rested: a new one starts, once the last one has given back what it held."""
        if self._resting and self._groups and self._replica.ended is not None:
            self._resting = False
            self._replica = Replica(0, self._start, self._inbox)

    def _add(self, group: _Group) -> None:
        if self._failure is not None:
            group.future.set_exception(self._failure)
            return
        if not group.rows:
            group.future.set_result([])
        for place, row in enumerate(group.rows):
            self._groups[self._next_row] = (group, place)
            self._dispatcher.add(Work(self._next_row, "", b"", b"", row))
            self._next_row += 1
        self._wake()

    def _finished(self, result: FinishedRequest) -> None:
        found = self._sent.pop(result.number, None)
        if found is None:
            return
        work, child = found
        work.results[child] = result
        if len(work.results) == work.size:
            self._dispatcher.done(0, work)
            if not any(one.error_code == "engine_killed" for one in work.results.values()):
                self._deaths_in_a_row = 0
            self._settle(work, [work.results[child] for child in range(work.size)])

    def _ranks_died(self, death: Death) -> None:
        """The engine deals with it, or gives up; what it found out is made to outlive it."""
        LOGGER.warning("ranks of the pipeline's engine died: %s", brief(death.reason))
        for number, alone in death.tried:
            if number in self._sent:
                self._sent[number][0].tries.add(alone, of_ranks=True)
        self._count_death(RuntimeError(f"the engine's ranks died again and again; the last time: {death.reason}"))

    def _count_death(self, error: Exception) -> None:
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > self._max_restarts:
            raise error

    def _settle(self, work: Work, answer: Answer) -> None:
        group, place = self._groups.pop(work.index)
        group.answers[place] = answer
        if len(group.answers) == len(group.rows):
            group.future.set_result([group.answers[place] for place in range(len(group.rows))])

    def _feed(self) -> None:
        if 0 not in self._dispatcher.lanes or not (works := self._dispatcher.take(0)):
            return
        requests: list[EngineRequest] = []
        for work in works:
            work.row.first_sequence = self._next_sequence  # never used twice: late answers find no owner
            self._next_sequence += work.size
            made = self._binder.requests(work.row, 0, work.size)
            for request in made:
                request.num_solo_deaths = work.tries.ranks_alone
            self._sent.update((request.number, (work, child)) for child, request in enumerate(made))
            requests += made
        self._replica.submit(requests)

    def _down(self, event: Down, error: Exception) -> None:
        if not event.booted:
            self._boot_failures += 1
            if self._boot_failures >= _MOST_BOOT_FAILURES:
                raise error
            LOGGER.warning("the pipeline's engine did not start again: %s", error)
            self._replica = Replica(0, self._start, self._inbox, delay_s=_RETRY_S * 2**self._boot_failures)
            return
        self._sent.clear()
        verdict = self._dispatcher.died(0)
        LOGGER.warning("the pipeline's engine died with %d rows in it: %s", len(verdict.tried), error)
        if verdict.guilty is not None:
            message = verdict.guilty.tries.story(str(error))
            self._settle(verdict.guilty, Fault("engine_killed", "engine", message))
        self._count_death(error)
        self._replica = Replica(0, self._start, self._inbox)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._replica.stop()
        for group in {id(group): group for group, _ in self._groups.values()}.values():
            group.future.set_exception(error)
        self._groups.clear()
        self._sent.clear()
        self._dispatcher.lanes.clear()
