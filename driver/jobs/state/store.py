"""Where a job keeps its state: small whole files, and the parts of its ledger."""

from __future__ import annotations

import errno
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator

CLAIM = "claim"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # of an OSError that passes once somebody makes room


class LedgerFullError(OSError):
    """The store has no room now; nothing that was durable is touched, and the same write may be tried again."""


class PartWriter(ABC):
    """Appends to the parts of one epoch."""

    @abstractmethod
    def append(self, data: bytes) -> tuple[str, int]:
        """Takes a record; the name of the part it will be in, and its offset there. Durable after `sync`."""

    @abstractmethod
    def sync(self, force: bool) -> bool:
        """Makes what was taken durable; False where nothing was, or a store of whole objects waits for more, which it
        does not where `force` is set.

        LedgerFullError when there is no room: everything that was taken is kept for the next `sync`.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what it holds; takes nothing more and writes nothing."""


class StateStore(ABC):
    """A folder of state, on a file system or an object store."""

    appends: bool  # an epoch has one part, which grows

    @abstractmethod
    def claim(self, epoch: int) -> None:
        """Takes an epoch for this process; FileExistsError where another has it."""

    @abstractmethod
    def is_claimed(self, epoch: int) -> bool:
        """Whether some process has taken the epoch."""

    @abstractmethod
    def writer(self, epoch: int) -> PartWriter:
        """Appends to the parts of an epoch that this process claimed."""

    @abstractmethod
    def names(self) -> dict[str, int]:
        """Name and size of everything in the store."""

    @abstractmethod
    def chunks(self, name: str, size: int, start: int = 0) -> Iterator[bytes]:
        """Bytes `start` to `size` of a part, piece by piece."""

    @abstractmethod
    def record(self, name: str, offset: int) -> bytes:
        """The line at an offset of a part."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Writes a small file, whole or not at all, over what was there."""

    @abstractmethod
    def get(self, name: str) -> bytes | None:
        """A small file; None where there is none."""

    @abstractmethod
    def discard(self, names: list[str]) -> None:
        """Frees the room of parts and digests that nothing needs any more; the claims of their epochs stay."""

    @abstractmethod
    def close(self) -> None:
        """Frees what reading holds."""

    def epochs(self) -> list[int]:
        """All claimed epochs, in order."""
        return sorted({epoch for name in self.names() if (epoch := epoch_of(name)) is not None})

    def parts(self, epoch: int) -> dict[str, int]:
        """Name and size of an epoch's parts, in the order they were written."""
        found = self.names()
        return {n: found[n] for n in sorted(found) if epoch_of(n) == epoch and not n.endswith(CLAIM)}

    def digests(self, epoch: int) -> list[str]:
        """Names of an epoch's digests, in the order they were written."""
        return sorted(name for name in self.names() if (found := _DIGEST.fullmatch(name)) and int(found[1]) == epoch)


def part_name(epoch: int, number: int | None = None) -> str:
    """The name of an epoch's only part, or of one of many."""
    return f"ledger-{epoch:06d}.jsonl" if number is None else f"ledger-{epoch:06d}-{number:08d}.jsonl"


def claim_name(epoch: int) -> str:
    """The object whose existence means that the epoch is taken."""
    return f"ledger-{epoch:06d}.{CLAIM}"


def seal_name(epoch: int) -> str:
    """The file with which an epoch's owner says what it takes over of those before."""
    return f"seal-{epoch:06d}.json"


def digest_name(epoch: int, number: int) -> str:
    """The name of a digest of an epoch's part."""
    return f"digest-{epoch:06d}-{number:08d}"


_LEDGER = re.compile(r"ledger-(\d{6,})(-\d{8,})?\.(jsonl|claim)")
_DIGEST = re.compile(r"digest-(\d{6,})-\d{8,}")


def epoch_of(name: str) -> int | None:
    """The epoch that a part or a claim belongs to."""
    found = _LEDGER.fullmatch(name)
    return int(found.group(1)) if found else None
