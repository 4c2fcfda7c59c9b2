"""A row on its way through an engine, and what waits to go there."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.driver.binding import Row
from shoal.driver.dispatch import Tries
from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.prefix import Position
from shoal.driver.params import SamplingParams
from shoal.driver.request import FinishedRequest


@dataclass(slots=True, eq=False)
class Work:
    """One row that an engine is to answer."""

    index: int  # of the input row
    row_id: str
    key: bytes
    raw: bytes  # its columns, as JSON: unpacked again only for its output
    row: Row
    tries: Tries = field(default_factory=Tries)
    results: dict[int, FinishedRequest] = field(default_factory=dict)  # by child

    @property
    def size(self) -> int:
        """Sequences it takes in an engine."""
        return self.row.bound.params.n

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt."""
        return self.row.token_ids

    @property
    def params(self) -> SamplingParams:
        """How it is sampled."""
        return self.row.bound.params

    @property
    def cache_salt(self) -> str | None:
        """What keeps its prefixes apart from others'."""
        return self.row.cache_salt

    @property
    def priority(self) -> int:
        """Lower goes first."""
        return self.row.priority


@dataclass(slots=True)
class Settled:
    """A row that needs no engine: it is in the ledger already, or it has a fault."""

    index: int
    location: int = -1  # of its record, where it has one
    row_id: str = ""
    key: bytes = b""
    raw: bytes = b""
    fault: Fault | None = None


@dataclass(slots=True)
class Chunk:
    """Consecutive rows of the input, each in one of two states."""

    num_rows: int
    end: Position  # after its rows
    work: list[Work] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
