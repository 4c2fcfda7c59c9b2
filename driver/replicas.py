"""How many engines there are: as many as were asked for, or as fit the cluster; dead ones are replaced.

Decides only: `Replica` starts and ends engines, and what the cluster has room for comes from a function. An engine that
is added later is created only where it can be placed at once, so that nothing stands in the cluster's queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from shoal.driver.jobs.outcome import brief_error
from shoal.driver.log import LOGGER
from shoal.driver.replica import Down, Place, Replica, StartEngine

if TYPE_CHECKING:
    from shoal.driver.config import Count

LOOK_S = 3.0  # between looks at what the cluster has room for, where an engine is wanted
RETRY_S = 1.0  # before an engine that did not start is tried again, doubled each time
MOST_FAILURES = 3  # starts that failed in a row, of one engine
_REST_S = 30.0  # before an engine that was given up is tried again, doubled each time
_LATE_PLACEMENT_S = 10.0  # for an engine that is added where there was room a moment ago


FindPlaces = Callable[[int | None, list[Place]], list[Place]]
"""(how many are wanted, None: all there is room for; where the others are) -> places, on nodes that have room now.

For a fixed number the list is filled up with Place(): the attempt then says what is missing."""


class NoEngineError(RuntimeError):
    """No engine is left, and none could be started."""


class Replicas:
    """The engines of one job or one LLM. For one thread; `tick` several times a second."""

    def __init__(
        self,
        count: Count,
        start: StartEngine,
        find_places: FindPlaces,
        inbox: SimpleQueue[Any],
        *,
        clock: Callable[[], float] = time.monotonic,
        aside: Executor | None = None,
    ) -> None:
        """`aside`: runs `find_places`, which may take its time."""
        self.count, self._start, self._find_places, self._inbox = count, start, find_places, inbox
        self.alive: dict[int, Replica] = {}  # by number: those that start, run, or are about to be replaced
        self.deaths = 0
        self._places: dict[int, Place] = {}
        self._up: set[int] = set()
        self._failures = 0  # in a row, of any
        self._failed: dict[int, int] = {}  # the same, by number
        self._proven = False  # some engine has been up
        self._clock = clock
        self._aside = aside or ThreadPoolExecutor(1, thread_name_prefix="places")
        self._looking: Future[list[Place]] | None = None
        self._next_look = 0.0

    @property
    def starting(self) -> bool:
        """Whether any is on its way."""
        return len(self._up) < len(self.alive)

    def begin(self) -> None:
        """Starts the first ones, side by side. Raises what `find_places` does."""
        places = self._find_places(None if self.count == "auto" else self.count, [])
        for place in places or [Place()]:
            self._add(place)

    def came_up(self, replica: Replica) -> None:
        """One is ready."""
        self._up.add(replica.number)
        self._failures = 0
        self._failed.pop(replica.number, None)
        self._proven = True

    def went_down(self, down: Down, error: Exception) -> None:
        """One died, or did not start: it is tried again, or given up for now.

        NoEngineError when none is left. Of the first start, what trying again would not change: ValueError, TypeError,
        PlacementError.
        """
        number = down.replica.number
        place = self._places[number]
        self._up.discard(number)
        if down.booted:
            self.deaths += 1
            if self.count == "auto" and len(self.alive) > 1:  # wherever there is room
                self._drop(number, 0.0)
            else:
                self._launch(number, Place(None, place.num_sharing))
            return
        others = len(self.alive) > 1
        lacking = _cannot_be_placed(error) and not (self.count == "auto" and others)
        if not self._proven and (isinstance(error, (ValueError, TypeError)) or lacking):
            raise error
        self._failures += 1
        failures = self._failed[number] = self._failed.get(number, 0) + 1
        LOGGER.warning("replica %d did not start (%d in a row): %s", number, failures, brief_error(error))
        if failures < MOST_FAILURES and not (others and _cannot_be_placed(error)):
            self._launch(number, place, RETRY_S * 2**failures)
            return
        if not others:
            raise NoEngineError(f"no engine could be started; the last time: {brief_error(error)}")
        self._drop(number, min(600.0, _REST_S * 2 ** min(5, self._failures)))
        wanted = "as many replicas as fit" if self.count == "auto" else f"{self.count} replicas"
        LOGGER.warning("going on with %d of %s", len(self.alive), wanted)

    def tick(self) -> None:
        """Adds engines where there is room for those that are missing."""
        if self._looking is not None:
            if not self._looking.done():
                return
            looking, self._looking = self._looking, None
            try:
                places = looking.result()
            except Exception as error:  # the cluster is out of reach, or cannot hold one any more: engines go on
                LOGGER.warning("could not see what the cluster has room for: %s", brief_error(error))
                return
            for place in places[: self._num_missing()]:
                if place.node_id is not None:
                    number = self._add(replace(place, timeout_s=_LATE_PLACEMENT_S))
                    LOGGER.info("replica %d is added: there is room for it", number)
        elif self._num_missing() and self._proven and not self.starting and self._clock() >= self._next_look:
            self._next_look = self._clock() + LOOK_S
            missing = None if self.count == "auto" else self._num_missing()
            others = [self._places[number] for number in self.alive]
            self._looking = self._aside.submit(self._find_places, missing, others)

    def stop(self) -> None:
        """Asks all to end."""
        for replica in self.alive.values():
            replica.stop()
        self._aside.shutdown(wait=False, cancel_futures=True)

    def join(self, timeout_s: float) -> Iterator[Replica]:
        """Waits for their ends, one after the other."""
        deadline = time.monotonic() + timeout_s
        for replica in self.alive.values():
            replica.join(max(0.0, deadline - time.monotonic()))
            yield replica

    def _num_missing(self) -> int:
        return 1 << 20 if self.count == "auto" else self.count - len(self.alive)

    def _add(self, place: Place) -> int:
        number = next(n for n in range(len(self.alive) + 1) if n not in self.alive)
        self._launch(number, place)
        return number

    def _launch(self, number: int, place: Place, delay_s: float = 0.0) -> None:
        place = replace(place, one_of_many=self.count != 1)
        self._places[number] = place
        self.alive[number] = Replica(number, lambda: self._start(place), self._inbox, delay_s)

    def _drop(self, number: int, rest_s: float) -> None:
        del self.alive[number]
        self._failed.pop(number, None)
        self._next_look = self._clock() + rest_s


def _cannot_be_placed(error: Exception) -> bool:
    from shoal.driver.placement import PlacementError

    return isinstance(error, PlacementError)
