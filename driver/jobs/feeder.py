"""The thread that reads and prepares rows, a bounded number of chunks ahead of the loop."""

from __future__ import annotations

import contextlib
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from shoal.driver.jobs.events import Exhausted, NeedEngine
from shoal.driver.jobs.outcome import Exit, JobError, brief_error

if TYPE_CHECKING:
    from concurrent.futures import Future

    from shoal.driver.jobs.intake import Intake
    from shoal.driver.jobs.model import ModelTools


class Feeder:
    """Puts Chunks into an inbox, then Exhausted; NeedEngine before the first chunk that has work."""

    def __init__(self, intake: Intake, tools: Future[ModelTools], inbox: SimpleQueue[Any]) -> None:
        self._intake, self._tools, self._inbox = intake, tools, inbox
        self._allowed = threading.Semaphore(0)
        self._ahead = 0  # chunks that were allowed and have not come
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()

    def allow(self, chunks: int) -> None:
        """Lets the thread be up to so many chunks ahead."""
        while self._ahead < chunks:
            self._ahead += 1
            self._allowed.release()

    def received(self) -> None:
        """One of its chunks was taken out of the inbox."""
        self._ahead -= 1

    def stop(self) -> None:
        """No more chunks."""
        self._stopping = True
        self._tools.cancel()  # it may be waiting for a model that never came
        self._allowed.release()

    def join(self, timeout_s: float) -> None:
        """Waits for the end of the tasks that make chunks, once there are to be no more."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        num_rows = 0
        needed = False
        try:
            with contextlib.closing(self._intake.scanned()) as scanned:
                for found in scanned:
                    if found.needy and not needed:
                        needed = True
                        self._inbox.put(NeedEngine())
                    self._allowed.acquire()
                    if self._stopping:
                        return
                    chunk = self._intake.chunk(found)
                    num_rows += chunk.num_rows
                    self._inbox.put(chunk)
        except ValueError as error:  # of the user's; the loop raises it
            self._inbox.put(Exhausted(num_rows, error))
            return
        except Exception as error:  # whatever ended the tasks ends the job
            if not self._stopping:
                reason = f"the input could not be read: {brief_error(error)}"
                self._inbox.put(Exhausted(num_rows, JobError(Exit.FAILED, reason)))
            return
        self._inbox.put(Exhausted(num_rows))
