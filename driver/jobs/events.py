"""What other threads tell the loop of a job, and what it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.driver.jobs.model import ModelTools
    from shoal.driver.replica import StartEngine
    from shoal.driver.replicas import FindPlaces


@dataclass(slots=True)
class NeedEngine:
    """The first row came that needs an engine."""


@dataclass(slots=True)
class Exhausted:
    """The input was read to its end. `error`: why it could not be."""

    num_rows: int
    error: Exception | None = None


@dataclass(slots=True)
class Hooks:
    """What the runner calls."""

    start_engine: StartEngine
    find_places: FindPlaces
    make_tools: Callable[[Any], ModelTools]  # from an engine's resolved config
    tick: Callable[[], None]  # several times a second
    settled: Callable[[Sequence[int]], None]  # rows that are durable now
