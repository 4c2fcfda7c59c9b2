"""Requests to stop: Ctrl-C, SIGTERM, `ray job stop`. The first lets running rows finish, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from shoal.driver.jobs.outcome import Exit

_CTRL_C_DRAIN_S = 30.0
_RAY_WAIT_S = 3.0  # what `ray job stop` gives unless RAY_JOB_STOP_WAIT_TIME_S says otherwise
_MARGIN_S = 1.0  # of that time, kept for writing down what was finished
_CODES = {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.TERMINATED}


class StopRequest:
    """Whether the job was asked to stop, and until when rows may still finish."""

    def __init__(self, drain_s: float | None) -> None:
        self._drain_s = drain_s
        self._deadline = float("inf")
        self._before: dict[signal.Signals, Any] = {}
        self.asked = False
        self.at_once = False  # it was asked twice
        self.code = Exit.INTERRUPTED

    @property
    def left_s(self) -> float:
        """Seconds that rows at work have left."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def due(self) -> bool:
        """Time is up."""
        return self.asked and time.monotonic() >= self._deadline

    def ask(self, code: Exit, drain_s: float) -> None:
        """A request; a second one ends the wait."""
        if self.asked:
            self._deadline = 0.0
            self.at_once = True
            return
        self._deadline = time.monotonic() + drain_s
        self.code = code
        self.asked = True

    def __enter__(self) -> Self:
        """Takes the signals over. Only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in _CODES}
        return self

    def take_back(self) -> None:
        """To be called when a thread has connected Ray, whose own handler aborts the process 3 s after a SIGTERM."""
        if self._before:
            for number in _CODES:
                signal.signal(number, self._on_signal)
            if self.asked:
                signal.alarm(0)  # the signal came in between

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        drain_s = self._drain_s
        if drain_s is None:
            wait_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", _RAY_WAIT_S))
            drain_s = _CTRL_C_DRAIN_S if kind == signal.SIGINT else max(0.0, wait_s - _MARGIN_S)
        self.ask(_CODES[kind], drain_s)  # and nothing else: it may be in the middle of writing a log line
