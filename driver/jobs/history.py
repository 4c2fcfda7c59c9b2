"""What happened while a job ran: a time series, and events. The report is drawn from them."""

from __future__ import annotations

import time
from typing import Any

_MOST_SAMPLES = 2000
_MOST_EVENTS = 500


class Samples:
    """A time series of a bounded number of points: when there are too many, every other one goes. Beside it, events
    (the first ones of a run that has too many) and what each engine was."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.events: list[dict[str, Any]] = []
        self.num_events_dropped = 0
        self.engines: dict[int, dict[str, Any]] = {}  # by replica: resolved config of the last one
        self._every = 1.0
        self._last = 0.0

    def add(self, **values: float) -> None:
        """A point, unless the last one is too near."""
        now = time.time()
        if now - self._last < self._every:
            return
        self._last = now
        self.points.append({"time": round(now, 2), **values})
        if len(self.points) > _MOST_SAMPLES:
            self.points = self.points[::2]
            self._every *= 2

    def finish(self) -> None:
        """The next point counts, however near: it is the last one."""
        self._last = 0.0

    def event(self, kind: str, message: str) -> None:
        """Something that a person should see in the report. `kind`: engine_up, engine_death, boot_failure, quarantine,
        paused, resumed or stop."""
        if len(self.events) >= _MOST_EVENTS:
            self.num_events_dropped += 1
            return
        self.events.append({"time": round(time.time(), 2), "kind": kind, "message": message})
