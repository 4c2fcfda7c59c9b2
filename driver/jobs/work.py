"""A row on its way through an engine, and what waits to go there."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.driver.binding import Row
from shoal.driver.jobs.faults import Fault
from shoal.driver.request import FinishedRequest


@dataclass(slots=True)
class Tries:
    """How often an engine died with a row in it. Deaths of ranks that the engine outlived are counted apart: it keeps
    rows that may have killed them from the others by itself."""

    in_company: int = 0
    alone: int = 0
    ranks_in_company: int = 0
    ranks_alone: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.in_company + self.alone + self.ranks_in_company + self.ranks_alone

    def add(self, alone: bool, of_ranks: bool) -> None:
        """One more."""
        if of_ranks:
            self.ranks_alone += alone
            self.ranks_in_company += not alone
        else:
            self.alone += alone
            self.in_company += not alone


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
    work: list[Work] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
