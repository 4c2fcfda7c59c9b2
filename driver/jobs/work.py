"""A row on its way through an engine, and what waits to go there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.driver.binding import Row
from shoal.driver.dispatch import Tries
from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.keys import Int64
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
    size: int = field(init=False)  # sequences it takes in an engine; asked for ten times a row

    def __post_init__(self) -> None:
        self.size = self.row.bound.params.n

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


@dataclass(frozen=True, slots=True)
class Known:
    """The first rows of the input, not read since the ledger has them all; millions, maybe, and so no objects."""

    values: Int64  # of each: location of its record << 1 | whether it is an error

    @property
    def indices(self) -> range:
        """Of its rows."""
        return range(len(self.values))


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
    """Consecutive rows of the input, each in one of two states; or rows that were not read, and no others."""

    num_rows: int
    end: Position  # after its rows
    known: Known | None = None
    work: list[Work] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)

    @property
    def settled_before(self) -> Sequence[int]:
        """Indices of rows that earlier runs settled."""
        known: Sequence[int] = () if self.known is None else self.known.indices
        return known or [row.index for row in self.settled if row.fault is None]
