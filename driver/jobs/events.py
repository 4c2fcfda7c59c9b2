"""What other threads tell the loop of a job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class NeedEngine:
    """The first row came that needs an engine."""


@dataclass(slots=True)
class Exhausted:
    """The input was read to its end. `error`: why it could not be."""

    num_rows: int
    error: Exception | None = None
