"""Sums that travel while the GPU computes: for large steps, cut into two halves of rows.

While one half's layer computes, the other half's sum is under way: copy engines fetch the other ranks' parts of this
rank's rows and carry the results back, so products keep all multiprocessors; in between one small kernel adds,
normalizes and updates the residual. Ranks tell each other how far they are by words in each other's memory that streams
write and wait for, which needs no multiprocessor either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from shoal.kernels.ops.sum_add_norm import sum_add_norm

if TYPE_CHECKING:
    from shoal.workers.layers.norm import RMSNorm
    from shoal.workers.peers import PeerMemory

_WRITE_DEFAULT, _WAIT_AT_LEAST = 0, 0  # CU_STREAM_WRITE_VALUE_DEFAULT: all before is visible; CU_STREAM_WAIT_VALUE_GEQ
READY, DONE = 0, 1  # a rank's part is there; a rank has read and written all it had to


class Link(Protocol):
    """How a sum is kept apart from the computation, and in step with the other ranks."""

    def apart(self) -> Any:
        """Context: what is enqueued inside comes after all enqueued so far, and nothing outside waits for it."""
        ...

    def mark(self) -> Any:
        """This point of `apart`, for `join`."""
        ...

    def join(self, mark: Any) -> None:
        """What is enqueued from now on comes after the mark."""
        ...

    def meet(self, kind: int) -> None:
        """Tell the other ranks, wait for all of them."""
        ...


class StreamLink:
    """A stream of its own, and words in symmetric memory."""

    def __init__(self, handle: Any, words: torch.Tensor, rank: int, world_size: int) -> None:
        """`words` int32 [2, world_size], zero: this rank's, where the others count their messages."""
        self._words, self._counts = words, [0, 0]  # words: kept alive
        others = [
            (peer, handle.get_buffer(peer, words.shape, words.dtype)) for peer in range(world_size) if peer != rank
        ]
        # For each kind of message: where this rank writes, and where the others write.
        self._to = [[remote[kind, rank].data_ptr() for _, remote in others] for kind in (READY, DONE)]
        self._from = [[words[kind, peer].data_ptr() for peer, _ in others] for kind in (READY, DONE)]
        self._stream = torch.cuda.Stream(priority=-1)
        driver = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """See Link."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event:
        """See Link."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def join(self, mark: torch.cuda.Event) -> None:
        """See Link."""
        torch.cuda.current_stream().wait_event(mark)

    def meet(self, kind: int) -> None:
        """See Link."""
        self._counts[kind] += 1
        stream, count = torch.cuda.current_stream().cuda_stream, self._counts[kind]
        errors = [self._write(stream, word, count, _WRITE_DEFAULT) for word in self._to[kind]]
        errors += [self._wait(stream, word, count, _WAIT_AT_LEAST) for word in self._from[kind]]
        if any(errors):
            raise RuntimeError(f"CUDA stream memory operations failed with {errors}")


class Overlap:
    """Sums of the two halves of a step. All ranks make the same calls in the same order."""

    def __init__(self, peers: PeerMemory, link: Link) -> None:
        self._peers, self._link = peers, link
        world_size = peers.world_size
        share = -(-peers.num_rows // world_size)
        self._staging = peers.own_parts.new_empty(world_size - 1, share, peers.own_parts.shape[1])
        self._marks: dict[int, Any] = {}  # by a half's first row: its last sum
        self.first: int | None = None  # of the half that is being computed
        self.num_sums = 0  # since the start

    @contextmanager
    def half(self, first: int) -> Iterator[None]:
        """Compute the half that begins at this row: what its last sum gave is there, its next sum travels."""
        if first in self._marks:
            self._link.join(self._marks.pop(first))
        self.first = first
        try:
            yield
        finally:
            self.first = None

    def sum(self, num_rows: int, residual: torch.Tensor, norm: RMSNorm | None) -> None:
        """Start summing the parts of this half's rows into the sums; `half` or `finish` waits for it."""
        assert self.first is not None
        self.num_sums += 1
        peers = self._peers
        begin, count = peers.share(num_rows)
        own = slice(self.first + begin, self.first + begin + count)
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        with self._link.apart():
            self._link.meet(READY)
            others = [buffer for rank, buffer in enumerate(peers.buffers) if rank != peers.rank]
            size = peers.own_parts.shape[1]
            parts = self._staging.view(-1)[: len(others) * count * size].view(len(others), count, size)
            for part, (remote_parts, _) in zip(parts, others, strict=True):
                part.copy_(remote_parts[own], non_blocking=True)
            sums, mine = peers.own_sums[own], peers.own_parts[own]
            stream = residual[begin : begin + count]
            sum_add_norm(parts, sums.unsqueeze(0), stream, weight, eps, 0, count, None, mine)
            for _, remote_sums in others:
                remote_sums[own].copy_(sums, non_blocking=True)
            self._link.meet(DONE)
            self._marks[self.first] = self._link.mark()

    def results(self, num_rows: int) -> torch.Tensor:
        """[num_rows, size]: what the last sums of both halves gave; lives until the next sum."""
        sums: torch.Tensor = self._peers.own_sums
        return sums[:num_rows]

    def finish(self) -> None:
        """Wait for the sums under way."""
        for mark in self._marks.values():
            self._link.join(mark)
        self._marks.clear()
