"""An engine that serves a pipeline ends when its client is silent: Ray is slow to end what a dead process owned."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from shoal.driver.log import LOGGER


class Lease:
    """Ends this process, after `end()`, once it was not renewed for `seconds`."""

    def __init__(self, seconds: float, end: Callable[[], None]) -> None:
        self._seconds, self._end = seconds, end
        self._renewed = time.monotonic()
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def renew(self) -> None:
        """The client lives."""
        self._renewed = time.monotonic()

    def change(self, seconds: float) -> None:
        """From now on it may be silent for so long."""
        with self._changed:
            self._seconds = seconds
            self.renew()
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while (left := self._renewed + self._seconds - time.monotonic()) > 0:
                self._changed.wait(left)
        LOGGER.warning("nobody asked for results for %.0f s: the engine ends", self._seconds)
        try:
            self._end()
        finally:
            os._exit(0)
