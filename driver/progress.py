"""The progress bar of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol, Self

REFRESH_S = 1.0  # how often a bar is redrawn while nothing finishes


class Counts(Protocol):
    """What a batch has done so far."""

    num_settled: int  # sequences
    num_input_tokens: int
    num_output_tokens: int


class Load(Protocol):
    """What the driver is doing."""

    num_running: int
    num_waiting: int


class Progress:
    """One bar, or none. It is drawn when made, before any work, so that a long call is never silent."""

    def __init__(self, use_tqdm: bool | Callable[..., Any], total: int, description: str = "Processed prompts") -> None:
        """`use_tqdm`: False for no bar, or what to call in place of tqdm; `total`: sequences, children of n counted."""
        if not isinstance(use_tqdm, bool) and not callable(use_tqdm):
            raise TypeError(f"use_tqdm must be a bool or a callable that makes a bar, got {type(use_tqdm).__name__}")
        self._bar: Any = None
        self._total = total
        self._shown = 0
        self._started = self._drawn = time.perf_counter()
        if use_tqdm is not False:
            self._bar = _maker(use_tqdm)(total=total, desc=description, dynamic_ncols=True, postfix=_speed(0, 0))
            self._bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Moves the bar by `count`, nothing else said."""
        if self._bar is not None:
            self._bar.update(count)

    def show(self, batches: Iterable[Counts], load: Load) -> None:
        """Moves the bar to what the batches have done."""
        if self._bar is None:
            return
        done = inputs = outputs = 0
        for batch in batches:
            done += batch.num_settled
            inputs += batch.num_input_tokens
            outputs += batch.num_output_tokens
        now = time.perf_counter()
        if done == self._shown and now - self._drawn < REFRESH_S:
            return
        elapsed = max(now - self._started, 1e-9)
        state = f", running: {load.num_running}, waiting: {load.num_waiting}"
        self._bar.set_postfix_str(_speed(inputs / elapsed, outputs / elapsed) + state, refresh=False)
        self._bar.update(done - self._shown)
        if done == self._total or now - self._drawn >= REFRESH_S:
            self._bar.refresh()
            self._drawn = now
        self._shown = done


def _maker(use_tqdm: bool | Callable[..., Any]) -> Callable[..., Any]:
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm

    return tqdm


def _speed(inputs: float, outputs: float) -> str:
    return f"est. speed input: {inputs:.2f} toks/s, output: {outputs:.2f} toks/s"
