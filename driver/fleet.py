"""Several engines behind the calls of one: what LLM uses where it has replicas.

Rows go to the engine that has their prefix, else to the one with least to do (`Dispatcher`); an engine that dies is
replaced and its rows go to others (`Replicas`). Numbers and random streams are the client's, so tokens do not depend
on which engine made them.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from shoal.driver import engine as engines
from shoal.driver.cluster import find_places
from shoal.driver.config import check_count
from shoal.driver.dispatch import Dispatched, Dispatcher
from shoal.driver.healing import EngineDeadError
from shoal.driver.jobs.outcome import brief_error
from shoal.driver.log import LOGGER, set_up_logging
from shoal.driver.metrics import Metric, add_up
from shoal.driver.replica import Down, News, Place, Replica, StartEngine, Up
from shoal.driver.replicas import FindPlaces, NoEngineError, Replicas
from shoal.driver.request import EngineRequest, FinishedRequest

if TYPE_CHECKING:
    from shoal.driver.config import Count, EngineConfig
    from shoal.driver.resolve import ResolvedConfig

_TICK_S = 0.1
_AHEAD = 256  # sequences for each engine that wait here, so that there is a choice of what goes where
_SOLO_DEATHS = 3
_MOST_DEATHS = 12  # of engines in a row, with no row finished in between
_END_S = 60.0


@dataclass(slots=True)
class FleetNews:
    """What `collect` gives: as an engine's, over all of them."""

    finished: list[FinishedRequest]
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_made_tokens: int


class Fleet:
    """The engines of one LLM. For one thread."""

    def __init__(
        self,
        config: EngineConfig,
        count: Count,
        start: StartEngine,
        find_places: FindPlaces,
        on_end: Callable[[], None],
    ) -> None:
        """Starts engines side by side and waits until all are up; with "auto", until those are that can be.

        `on_end` is called at the end of `shutdown`.
        """
        self._on_end: Callable[[], None] | None = on_end
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._dispatcher: Dispatcher[Dispatched] = Dispatcher(
            _SOLO_DEATHS, config.block_size, config.enable_prefix_caching
        )
        self._engines = Replicas(count, start, find_places, self._inbox)
        self._sequences: dict[int, Dispatched] = {}
        self._finished: list[FinishedRequest] = []
        self._deaths_in_a_row = 0
        self._failure: Exception | None = None
        self._stopped: set[str] = set()  # what sleep() took away
        self.resolved: ResolvedConfig
        try:
            self._engines.begin()
            while self._engines.starting or not self._ups:
                self._take_news(_TICK_S)
        except BaseException:
            self._end()
            raise
        atexit.register(self.shutdown)
        self.resolved = min((one.engine.resolved for one in self._ups), key=lambda resolved: resolved.max_model_len)

    # ---- rows ----------------------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Sequences that may be here at once."""
        slots = [lane.slots for lane in self._dispatcher.lanes.values()] or [self.resolved.max_num_seqs]
        return sum(2 * each + max(_AHEAD, each // 2) for each in slots)

    @property
    def num_replicas(self) -> int:
        """Engines that are up."""
        return len(self._ups)

    def submit(self, requests: list[EngineRequest]) -> None:
        """Queue requests."""
        self._check()
        if self._stopped & {"weights", "kv_cache"}:
            raise RuntimeError("the engine sleeps: call wake_up() first")
        for request in requests:
            sequence = self._sequences[request.number] = Dispatched(request)
            self._dispatcher.add(sequence)
        self._give_out()

    def collect(self, timeout: float) -> FleetNews:
        """Finished requests, as soon as there are any or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            self._take_news(min(_TICK_S, max(0.0, deadline - time.monotonic())) if not self._finished else 0.0)
            self._give_out()
            if self._finished or time.monotonic() >= deadline:
                break
        finished, self._finished = self._finished, []
        if not finished:
            self._check()
        ups = self._ups
        return FleetNews(
            finished,
            sum(one.num_running for one in ups),
            sum(one.num_waiting for one in ups) + self._dispatcher.num_waiting,
            max((one.kv_cache_usage for one in ups), default=0.0),
            self.num_made_tokens(),
        )

    def abort(self, numbers: list[int]) -> None:
        """End these requests; none of them comes out of a later `collect`."""
        gone = set(numbers)
        self._finished = [result for result in self._finished if result.number not in gone]
        by_lane: dict[int, list[int]] = {}
        for number in numbers:
            sequence = self._sequences.pop(number, None)
            if sequence is None:
                continue
            if sequence.lane < 0:
                self._dispatcher.withdraw(number)
            else:
                self._dispatcher.done(sequence.lane, sequence)
                by_lane.setdefault(sequence.lane, []).append(number)
        if not self._sequences:  # an interrupt may have come while they were handed out: they may be anywhere
            self._dispatcher.clear()
            by_lane = {one.number: numbers for one in self._ups} if numbers else {}
        for lane, those in by_lane.items():
            self._engines.alive[lane].abort(those)

    def num_made_tokens(self) -> int:
        """Tokens that the engines which are up have made, as they last said."""
        return sum(one.generated for one in self._ups)

    # ---- calls that go to every engine -----------------------------------------------------------------------------

    def call_workers(
        self, method: str | Callable[..., Any], timeout: float | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        """A call on every rank of every engine; results by engine, then by rank. Engines that come later miss it."""
        return [
            result for one in self._each() for result in one.engine.call_workers(method, timeout, args, kwargs)
        ]  # fmt: skip

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget cached prefixes, everywhere; False where an engine holds blocks."""
        found = [one.engine.reset_prefix_cache(reset_running_requests) for one in self._each()]
        self._dispatcher.router.forget_prefixes()
        return all(found)

    def sleep(self, level: int, mode: str) -> None:
        """See Driver.sleep. Requests that wait here end, are waited for, or stay, as those in the engines do."""
        engines = self._each()
        if mode == "wait":
            while self._sequences:
                self._take_news(_TICK_S)
                self._give_out()
            engines = self._each()
        elif mode == "abort":
            for number, sequence in list(self._sequences.items()):
                if sequence.lane < 0:
                    self._dispatcher.withdraw(number)
                    del self._sequences[number]
                    self._finished.append(FinishedRequest(number, [], "abort"))
        self._stopped = {"scheduling"} if level == 0 else {"scheduling", "weights", "kv_cache"}
        for one in engines:
            one.engine.sleep(level, mode)
        if level:
            self._dispatcher.router.forget_prefixes()

    def wake_up(self, tags: list[str] | None) -> None:
        """See Driver.wake_up."""
        for one in self._each():
            one.engine.wake_up(tags)
        woken = {"weights", "kv_cache", "scheduling"} if tags is None else set(tags)
        back = woken & self._stopped & {"weights", "kv_cache"}
        self._stopped -= back
        if not self._stopped - {"scheduling"} and (back or "scheduling" in woken):
            self._stopped.clear()

    def metrics(self) -> list[Metric]:
        """Sums over the engines that are up, under the names of one engine; then each engine's own, with the label
        "replica"."""
        return add_up({str(one.number): one.engine.metrics() for one in self._each()}, self._engines.deaths)

    def driver_pid(self) -> int:
        """Process id of the first engine's driver actor."""
        return int(self._each()[0].engine.driver_pid())

    def shutdown(self) -> None:
        """End all engines, and give their resources back. At the latest when the process ends: their threads must not
        meet a Ray that is gone."""
        atexit.unregister(self.shutdown)
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            self._failure = self._failure or RuntimeError("the engines are shut down")
            self._end()
            on_end()

    def _end(self) -> None:
        self._engines.stop()
        for replica in self._engines.join(_END_S):
            if replica.ended is None:
                LOGGER.warning("replica %d had not ended after %.0f s", replica.number, _END_S)

    # ---- what engines say ------------------------------------------------------------------------------------------

    @property
    def _ups(self) -> list[Replica]:
        return [one for number, one in sorted(self._engines.alive.items()) if number in self._dispatcher.lanes]

    def _each(self) -> list[Any]:
        """Engines for a call to all: after news of those that died, and at least one."""
        self._take_news(0.0)
        while not self._ups:
            self._check()
            self._take_news(_TICK_S)
        self._check()
        return self._ups

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _take_news(self, timeout: float) -> None:
        try:
            event = self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait()
            while True:
                self._handle(event)
                event = self._inbox.get_nowait()
        except Empty:
            self._catch_up()
        if not self._stopped:  # nothing is started beside engines that sleep
            self._engines.tick()

    def _catch_up(self) -> None:
        """With what was lost when a user's interrupt came between taking an event and handling it."""
        for number, one in list(self._engines.alive.items()):
            if one.ended is not None and one.ended.error is not None and self._inbox.empty():
                self._handle(one.ended)
            elif one.is_up and one.ended is None and number not in self._dispatcher.lanes and self._inbox.empty():
                self._handle(Up(one))

    def _handle(self, event: Any) -> None:
        if isinstance(event, News):
            for number, alone in (tried for death in event.collected.deaths for tried in death.tried):
                if number in self._sequences:
                    self._sequences[number].tries.add(alone, of_ranks=True)
            for result in event.collected.finished:
                self._take(event.replica.number, result)
        elif isinstance(event, Up):
            resolved = event.replica.engine.resolved
            self._engines.came_up(event.replica)
            self._dispatcher.open_lane(event.replica.number, resolved.max_num_seqs, resolved.kv_cache_tokens)
        else:
            assert isinstance(event, Down)
            if event.error is not None:
                self._down(event, event.error)

    def _take(self, lane: int, result: FinishedRequest) -> None:
        sequence = self._sequences.get(result.number)
        if sequence is None or sequence.lane != lane:  # ended, or moved to another engine meanwhile
            return
        sequence.results[0] = result
        self._dispatcher.done(lane, sequence)
        del self._sequences[result.number]
        self._finished.append(result)
        self._deaths_in_a_row = 0

    def _down(self, event: Down, error: Exception) -> None:
        started = hasattr(self, "resolved")
        if not event.booted and not started and self._engines.count != "auto":
            raise error  # that many were asked for
        if event.booted:
            self._deaths_in_a_row += 1
            verdict = self._dispatcher.died(event.replica.number)
            LOGGER.warning("replica %d died with %d rows in it: %s", event.replica.number, len(verdict.tried), error)
            for sequence, _ in verdict.tried:
                sequence.lane = -1
            if verdict.guilty is not None:
                self._put_aside(verdict.guilty, error)
        try:
            if self._deaths_in_a_row > _MOST_DEATHS:
                raise NoEngineError(
                    f"engines died {self._deaths_in_a_row} times with no row finished in between; the last time: "
                    f"{brief_error(error)}"
                )
            self._engines.went_down(event, error)
        except Exception as last:
            if not started:
                raise
            self._failure = EngineDeadError(f"the engines are dead: {last}")

    def _put_aside(self, sequence: Dispatched, error: Exception) -> None:
        message = sequence.tries.story(brief_error(error))
        del self._sequences[sequence.index]
        self._finished.append(FinishedRequest(sequence.index, [], "error", error=message))

    def _give_out(self) -> None:
        if self._stopped:
            return
        dispatcher = self._dispatcher
        dispatcher.report({one.number: one.take_report() for one in self._ups})
        for number in list(dispatcher.lanes):
            self._send(number, dispatcher.take(number))
        for number in dispatcher.share():
            self._send(number, dispatcher.take(number))
        while (move := dispatcher.rebalance()) is not None:
            self._engines.alive[move.source].abort([sequence.index for sequence in move.works])
            self._send(move.target, move.works)

    def _send(self, number: int, sequences: list[Dispatched]) -> None:
        if sequences:
            for sequence in sequences:
                sequence.lane = number
                sequence.request.num_solo_deaths = sequence.tries.ranks_alone
            self._engines.alive[number].submit([sequence.request for sequence in sequences])


def start_engines(config: EngineConfig, replicas: Count, get_model: engines.GetModel) -> engines.Engine | Fleet:
    """One engine, or several behind one. Raises ValueError, PlacementError and what else keeps them from starting."""
    count = check_count(replicas)
    if count == 1:
        return engines.Engine.start(config, get_model)
    pinned: dict[str, Any] = {}

    def start(place: Place | None = None) -> engines.Engine:
        return engines.Engine.start(config.model_copy(update=pinned), get_model, revives=False, place=place)

    set_up_logging()
    engines.hold_ray(config.address)
    try:
        fleet = Fleet(config, count, start, partial(find_places, config), engines.release_ray)
    except BaseException:
        engines.release_ray()
        raise
    if config.max_model_len == -1:  # who comes later must take what was accepted before
        pinned["max_model_len"] = fleet.resolved.max_model_len
    return fleet
