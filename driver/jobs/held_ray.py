"""Ray, for as long as a job needs it."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from shoal.driver.jobs.pipeline import warm_up


class HeldRay:
    """Connects, or starts a Ray of its own, in a thread; gives it up at the latest when it is left.

    That thread stays until then: the processes of a Ray end with the thread that started them. Ray cannot take SIGTERM
    for itself there, which the job wants to hear of.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._thread: ThreadPoolExecutor | None = None
        self._opening: Future[list[Any]]
        self._held = False

    def begin(self) -> None:
        """Has it begin, unless it has; that takes seconds, in which something else may be done."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
            self._opening = self._thread.submit(self._open)

    def wait(self) -> list[Any]:
        """From here on there is one; what `warm_up` returned. Raises why there is none."""
        self.begin()
        return self._opening.result()

    def _open(self) -> list[Any]:
        from shoal.driver.engine import hold_ray

        logging.getLogger("ray._private.worker").addFilter(_is_news)
        hold_ray(self._address)
        self._held = True
        return warm_up()

    def end(self) -> None:
        """A Ray that was started for the job ends."""
        from shoal.driver.engine import release_ray

        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._opening.exception()  # waits
            if self._held:
                self._held = False
                release_ray()
            thread.shutdown()

    def __enter__(self) -> HeldRay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()


def _is_news(record: logging.LogRecord) -> bool:
    return "SIGTERM handler is not set" not in record.getMessage()
