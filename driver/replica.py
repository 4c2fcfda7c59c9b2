"""One engine among several, and the thread that starts it, listens to it and ends it. Its only output are events."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import ray

from shoal.driver.log import LOGGER
from shoal.driver.request import Death, EngineRequest, FinishedRequest

if TYPE_CHECKING:
    from shoal.driver.resolve import ResolvedConfig

REPLICA_THREAD = "replica-"
POLL_S = 0.25  # how long one wait for results lasts


class Collected(Protocol):
    """Results, and how busy the engine is."""

    finished: list[FinishedRequest]
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_made_tokens: int
    num_preemptions: int
    deaths: list[Death]


class EngineLike(Protocol):
    """What is needed of an engine. Every method raises once the engine is dead."""

    resolved: ResolvedConfig

    def submit(self, requests: list[EngineRequest]) -> None:
        """Adds requests."""

    def collect(self, timeout: float) -> Collected:
        """Results, at latest after `timeout` seconds."""

    def abort(self, numbers: list[int]) -> None:
        """Ends requests."""

    def end_when_silent(self, seconds: float) -> None:
        """Ends by itself, with all that it holds, when `collect` is not called for so long."""

    def num_made_tokens(self) -> int:
        """Tokens it has made; of a dead engine too, where its driver still answers."""

    def shutdown(self) -> None:
        """Ends it and gives back what it holds; of a dead one, what is left."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine is to go."""

    node_id: str | None = None  # None: where Ray finds room
    num_sharing: int = 1  # engines that share the node's cores
    timeout_s: float | None = None  # for placing; None: as configured
    one_of_many: bool = False  # others can do its rows: without a place for new ranks it ends, and does not wait


class StartEngine(Protocol):
    """Starts one engine, and waits until it is ready."""

    def __call__(self, place: Place | None = None) -> EngineLike:
        """`place`: None is wherever Ray finds room."""


@dataclass(slots=True)
class Up:
    """An engine is ready."""

    replica: Replica


@dataclass(slots=True)
class News:
    """What an engine had to say."""

    replica: Replica
    collected: Collected


@dataclass(slots=True)
class Down:
    """An engine is gone. `error`: why, None where it was told to stop; `booted`: it had been up."""

    replica: Replica
    error: Exception | None
    booted: bool


class Replica:
    """One engine's life, from its start to its end; after that, a new Replica."""

    def __init__(
        self, number: int, start: Callable[[], EngineLike], inbox: SimpleQueue[Any], delay_s: float = 0.0
    ) -> None:
        self.number = number
        self.session = uuid.uuid4().hex[:12]
        self.generated = 0  # tokens it made, as it last said
        self.received = 0  # tokens that came from it, in results
        self.num_running = self.num_waiting = self.num_preemptions = 0
        self.kv_cache_usage = 0.0
        self.engine: EngineLike
        self._start, self._inbox, self._delay_s = start, inbox, delay_s
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self.is_up = False
        self._report: int | None = None
        self.ended: Down | None = None
        self._thread = threading.Thread(target=self._run, name=f"{REPLICA_THREAD}{number}", daemon=True)
        self._thread.start()

    def submit(self, requests: list[EngineRequest]) -> None:
        """Hands rows over. A failure comes as the replica's end, not from here."""
        self._try(lambda: self.engine.submit(requests))

    def abort(self, numbers: list[int]) -> None:
        """Ends rows. A failure comes as the replica's end."""
        self._try(lambda: self.engine.abort(numbers))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # the engine died; its thread tells of it
            self._failure = self._failure or error
            self._stop.set()

    def take_report(self) -> int | None:
        """Sequences that wait in it, if it has told since the last call: rows may have left it since."""
        report, self._report = self._report, None
        return report

    def stop(self) -> None:
        """Asks it to end."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        """Waits for its end; `ended` tells whether it came."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        if self._stop.wait(self._delay_s):
            self._end(None, booted=False)
            return
        try:
            self.engine = self._start()
        except Exception as error:  # the job decides what it means
            self._end(error, booted=False)
            return
        self.is_up = True
        self._inbox.put(Up(self))
        failure: Exception | None = None
        try:
            self._listen()
        except Exception as error:  # whatever ends the listening ends the engine
            failure = error
        with contextlib.suppress(ray.exceptions.RayError):  # its driver died too: what it said last counts
            self.generated = self.engine.num_made_tokens()
        try:
            self.engine.shutdown()
        except Exception as error:
            LOGGER.warning("replica %d did not end cleanly: %s", self.number, error)
        self._end(failure or self._failure, booted=True)

    def _end(self, error: Exception | None, booted: bool) -> None:
        self.ended = Down(self, error, booted)
        self._inbox.put(self.ended)

    def _listen(self) -> None:
        while not self._stop.is_set():
            collected = self.engine.collect(POLL_S)
            self.num_running, self.num_waiting = collected.num_running, collected.num_waiting
            self.kv_cache_usage = collected.kv_cache_usage
            self._report = collected.num_waiting
            self.generated = collected.num_made_tokens
            self.num_preemptions = collected.num_preemptions
            if collected.finished or collected.deaths:
                self._inbox.put(News(self, collected))
