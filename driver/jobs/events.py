"""What other threads tell the loop of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.driver.jobs.replica import Collected, Replica


@dataclass(slots=True)
class NeedEngine:
    """The first row came that needs an engine."""


@dataclass(slots=True)
class Exhausted:
    """The input was read to its end. `error`: why it could not be."""

    num_rows: int
    error: Exception | None = None


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
