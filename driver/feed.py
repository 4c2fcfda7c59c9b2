"""Feeds the driver: lazily, never more than a window of sequences at once, and takes back what is finished.

A `Batch` is the work of one call. `Feed` runs batches: it makes rows ready (parse, tokenize) while the engine works on
those before, submits as room appears, hands results to their batch, and cleans up whatever way a call ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from shoal.driver.progress import Progress
from shoal.driver.request import EngineRequest, FinishedRequest

POLL_S = 0.25  # how long one wait for results lasts, so that bars move and Ctrl-C is seen
READY_AHEAD = 256  # rows kept ready beyond the window


class Collected(Protocol):
    """What the driver had to say: results since the last call, and how busy it is."""

    finished: list[FinishedRequest]
    num_running: int
    num_waiting: int


class EngineClient(Protocol):
    """What feeding needs of the engine."""

    @property
    def window(self) -> int:
        """Sequences that may be unfinished in it: enough that its queue does not run dry between two deliveries."""

    def submit(self, requests: list[EngineRequest]) -> None:
        """Adds requests."""

    def collect(self, timeout: float) -> Collected:
        """Results, as soon as there are any, at latest after `timeout` seconds."""

    def abort(self, numbers: list[int]) -> None:
        """Ends requests; when it returns, no result of theirs will come. Numbers it does not know are skipped."""


class Batch(ABC):
    """The work of one call, in sequences (EngineRequests)."""

    num_settled: int = 0  # sequences that have their answer or error
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    failure: Exception | None = None  # why the whole call must end

    @property
    @abstractmethod
    def done(self) -> bool:
        """Everything is settled."""

    @property
    @abstractmethod
    def num_ready(self) -> int:
        """Rows that `take` has at hand."""

    @abstractmethod
    def prepare(self) -> bool:
        """Makes the next rows ready; False when there are none left."""

    @abstractmethod
    def take(self, room: int) -> list[EngineRequest]:
        """Up to `room` requests to submit now."""

    @abstractmethod
    def finish(self, result: FinishedRequest) -> None:
        """Takes one result. Taking it again changes nothing."""

    @abstractmethod
    def requeue(self, numbers: Iterable[int]) -> None:
        """Makes taken, unfinished requests ready again."""


class RequestBatch(Batch):
    """Requests that are ready made."""

    def __init__(self, requests: Sequence[EngineRequest]) -> None:
        self._all = {request.number: request for request in requests}
        self._ready = deque(requests)
        self.results: dict[int, FinishedRequest] = {}

    @property
    def done(self) -> bool:
        """All results are there."""
        return len(self.results) == len(self._all)

    @property
    def num_ready(self) -> int:
        """Requests not taken yet."""
        return len(self._ready)

    def prepare(self) -> bool:
        """There is nothing to prepare."""
        return False

    def take(self, room: int) -> list[EngineRequest]:
        """The next requests."""
        return [self._ready.popleft() for _ in range(min(room, len(self._ready)))]

    def finish(self, result: FinishedRequest) -> None:
        """Keeps a result; an error fails the batch."""
        self.results[result.number] = result
        self.num_settled = len(self.results)
        if result.finish_reason == "error":
            self.failure = ValueError(result.error or "the request failed without a message")

    def requeue(self, numbers: Iterable[int]) -> None:
        """Puts requests back in front."""
        self._ready.extendleft(self._all[n] for n in sorted(numbers, reverse=True) if n not in self.results)


class Feed:
    """All traffic of one client with its engine. For one thread."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._batches: list[Batch] = []
        self._owner: dict[int, Batch] = {}  # of each sequence in the driver

    @property
    def num_unfinished(self) -> int:
        """Sequences in the driver now."""
        return len(self._owner)

    def run(self, batches: Sequence[Batch], progress: Progress) -> None:
        """Runs until all of `batches` are done; other batches go on meanwhile.

        If a batch fails, or anything else is raised (Ctrl-C too), all requests of `batches` are aborted first.
        """
        try:
            self._batches += [batch for batch in batches if batch not in self._batches]
            while not all(batch.done for batch in batches):
                more = self._fill()
                self._raise_failure(batches)
                if not more and not self._owner:
                    assert all(batch.done for batch in batches), "nothing to do, and not done"
                    break
                collected = self._engine.collect(0.0 if more else POLL_S)
                self._route(collected.finished)
                self._raise_failure(batches)
                progress.show(batches, collected)
        except BaseException as error:
            self._abandon(batches, error)
            raise
        self._forget(batches)

    def start(self, batch: Batch, progress: Progress) -> None:
        """Makes all of a batch ready and lets the engine begin with it; `run` finishes it. Fails as `run` does."""
        try:
            self._batches.append(batch)
            ready = batch.num_ready
            while batch.prepare():
                progress.advance(batch.num_ready - ready)
                self._submit_ready(prepare=False)
                ready = batch.num_ready
            self._raise_failure([batch])
            self._submit_ready(prepare=False)
        except BaseException as error:
            self._abandon([batch], error)
            raise

    def _fill(self) -> bool:
        """Submits what there is room for, then makes a chunk ready ahead; True if it did the latter."""
        self._submit_ready(prepare=True)
        return any(batch.num_ready < READY_AHEAD and batch.prepare() for batch in self._batches)

    def _submit_ready(self, prepare: bool) -> None:
        for batch in self._batches:
            window = self._engine.window
            grain = max(1, window // 8)  # submitting fewer at a time costs calls and gains nothing
            while (room := window - len(self._owner)) >= grain or (room and not self._owner):
                requests = batch.take(room)
                if requests:
                    self._owner.update((request.number, batch) for request in requests)
                    self._engine.submit(requests)
                elif not (prepare and batch.prepare()):
                    break

    def _route(self, finished: list[FinishedRequest]) -> None:
        for result in finished:
            batch = self._owner.get(result.number)
            if batch is not None:  # None: an abort that was itself interrupted let it through
                batch.finish(result)
                del self._owner[result.number]

    def _raise_failure(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            if batch.failure is not None:
                raise batch.failure

    def _abandon(self, batches: Sequence[Batch], error: BaseException) -> None:
        """Leaves nothing of `batches` behind. After an interrupt, results on their way may be lost: of every batch."""
        interrupted = not isinstance(error, Exception)
        gone = [number for number, owner in self._owner.items() if interrupted or owner in batches]
        again: dict[Batch, list[int]] = {}
        for number in gone:
            owner = self._owner.pop(number)
            if owner not in batches:
                again.setdefault(owner, []).append(number)
        self._forget(batches)
        for batch, numbers in again.items():
            batch.requeue(numbers)
        if gone:
            try:
                self._engine.abort(gone)
            except Exception as second:
                error.add_note(f"aborting the requests of this call failed too: {second!r}")

    def _forget(self, batches: Sequence[Batch]) -> None:
        self._batches = [batch for batch in self._batches if batch not in batches]


def request_failure(index: int, noun: str, error: Any) -> ValueError:
    """The exception for a row that the driver refused or could not finish."""
    return ValueError(f"{noun} {index}: {error or 'the request failed without a message'}")
