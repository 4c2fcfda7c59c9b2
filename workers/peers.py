"""PeerMemory: sums over the ranks of one host through memory that all of them map, with residual and norm inside.

Each rank adds up a share of the rows, reading every rank's part and writing the result to every rank: each byte crosses
the link as often as in NCCL's all-reduce, in two kernels fewer, and the norm is computed once, not once a rank. Peer
loads and stores only: NVLink multicast is never asked for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from shoal.kernels.ops.sum_add_norm import sum_add_norm
from shoal.workers.overlap import Overlap, StreamLink

if TYPE_CHECKING:
    from shoal.workers.layers.norm import RMSNorm

LOGGER = logging.getLogger("shoal")
_MOST_BYTES = 512 << 20  # of a rank's parts: larger steps go through NCCL
_MEETING_ROWS = 512  # of a rank: up to here the kernel's programs wait for their like themselves, each for its row
_PLACE_BYTES = 512  # of what a rank says of its place, as JSON
_COPY_BYTES = 4 << 20  # up to here all_reduce, which copies in and out, is faster than NCCL


class PeerMemory:
    """One rank's buffers and what it knows of the others'. All ranks make the same calls in the same order."""

    def __init__(self, handle: Any, buffer: torch.Tensor, rank: int, world_size: int) -> None:
        """`buffer` [2, rows, size] is this rank's: its parts, and the sums it gets. `open` adds the rest."""
        self.rank, self.world_size = rank, world_size
        self._handle = handle
        _, self.num_rows, self._size = buffer.shape
        self.own_parts, self.own_sums = buffer
        self.buffers = [handle.get_buffer(peer, buffer.shape, buffer.dtype) for peer in range(world_size)]  # by rank
        places = [[peer[half].data_ptr() for peer in self.buffers] for half in range(2)]
        self._addresses = torch.tensor(places, dtype=torch.int64, device=buffer.device)
        self.overlap: Overlap | None = None
        self._words: torch.Tensor | None = None  # this rank's words for meetings, kept alive
        self._word_addresses: torch.Tensor | None = None

    @classmethod
    def open(
        cls, group: dist.ProcessGroup, rows: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> PeerMemory | None:
        """Buffers for steps of `rows` tokens; None, with the reason in the log, where ranks cannot map each other's."""
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        if rows * size * dtype.itemsize > _MOST_BYTES or size * dtype.itemsize % 16:
            reason = f"{rows} x {size} values of {dtype} exceed {_MOST_BYTES >> 20} MiB or are not in units of 16 bytes"
        else:
            reason = _obstacle(group, device)
        if reason:
            if rank == 0:
                LOGGER.warning("tensor-parallel sums go through NCCL: %s", reason)
            return None
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # only peer addresses are used
        import torch.distributed._symmetric_memory as symmetric

        buffer = symmetric.empty((2, rows, size), dtype=dtype, device=device).zero_()
        stream_words = symmetric.empty((2, world_size), dtype=torch.int32, device=device).zero_()
        words = symmetric.empty((2 * _MEETING_ROWS, world_size), dtype=torch.int32, device=device).zero_()
        torch.cuda.synchronize()  # zero before others write
        peers = cls(symmetric.rendezvous(buffer, group), buffer, rank, world_size)
        link = StreamLink(symmetric.rendezvous(stream_words, group), stream_words, rank, world_size)
        peers.overlap = Overlap(peers, link)
        handle = symmetric.rendezvous(words, group)
        shared = [handle.get_buffer(peer, words.shape, words.dtype).data_ptr() for peer in range(world_size)]
        peers._words, peers._word_addresses = words, torch.tensor(shared, dtype=torch.int64, device=device)
        return peers

    def linear_add_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        norm: RMSNorm | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RowParallelLinear.add_norm. The first result lives until the next call; of the second, only this rank's rows
        are kept up: nobody else needs them."""
        num_rows = x.shape[0]
        first = 0 if self.overlap is None or self.overlap.first is None else self.overlap.first
        part = self.own_parts[first : first + num_rows]
        torch.mm(x, weight.t(), out=part)
        if bias is not None and self.rank == 0:
            part += bias
        if scale != 1.0:
            part *= scale
        if self.overlap is not None and self.overlap.first is not None:
            self.overlap.sum(num_rows, residual, norm)
        else:
            self._sum(num_rows, self._size, residual, norm)
        return self.own_sums[first : first + num_rows], residual

    def share(self, num_rows: int) -> tuple[int, int]:
        """(first row, number of rows) of `num_rows` that this rank adds up."""
        return share_of(num_rows, self.rank, self.world_size)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The sum of a [rows, size] tensor over the ranks, if it is small enough to be faster than NCCL's."""
        if tensor.dim() != 2 or tensor.dtype != self.own_parts.dtype or tensor.numel() > self.own_parts.numel():
            return None
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes > _COPY_BYTES or tensor.shape[1] * tensor.element_size() % 16:
            return None
        self.own_parts.view(-1)[: tensor.numel()].copy_(tensor.reshape(-1))
        self._sum(tensor.shape[0], tensor.shape[1], None, None)
        summed: torch.Tensor = self.own_sums.view(-1)[: tensor.numel()].view(tensor.shape)
        return summed.clone()

    def _sum(self, num_rows: int, size: int, residual: torch.Tensor | None, norm: RMSNorm | None) -> None:
        first, count = self.share(num_rows)
        parts, sums = (
            half.view(-1)[: num_rows * size].view(1, num_rows, size) for half in (self.own_parts, self.own_sums)
        )
        own = None if residual is None else residual[first : first + count]
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        most = share_of(num_rows, 0, self.world_size)[1]
        if self._word_addresses is not None and most <= _MEETING_ROWS:
            meeting = (self.rank, most, self._word_addresses)
            sum_add_norm(parts, sums, own, weight, eps, first, count, self._addresses, None, meeting)
            return
        self._handle.barrier(channel=0)  # every rank's part is there
        sum_add_norm(parts, sums, own, weight, eps, first, count, self._addresses)
        self._handle.barrier(channel=1)  # every rank's rows are written, and its parts read


def share_of(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first row, number of rows) that a rank adds up."""
    share = -(-num_rows // world_size)
    first = min(num_rows, rank * share)
    return first, min(share, num_rows - first)


def _obstacle(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why these ranks cannot map each other's memory, the same on every rank; "" if they can."""
    places = _gather(group, device, [socket.gethostname(), _boot_id(), device.index])
    if len({tuple(place[:2]) for place in places}) > 1:
        return f"the ranks are on different hosts ({', '.join(sorted({place[0] for place in places}))})"
    for i, (_, _, a) in enumerate(places):
        for j, (_, _, b) in enumerate(places):
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                return f"the GPUs of ranks {i} and {j} have no peer access"
    return "two ranks share a GPU" if len({place[2] for place in places}) < len(places) else ""


def _gather(group: dist.ProcessGroup, device: torch.device, own: list[Any]) -> list[list[Any]]:
    """What every rank gave, by rank. JSON in tensors: torch's own gathering of objects unpickles what comes in."""
    text = json.dumps(own).encode()
    assert len(text) <= _PLACE_BYTES, f"{len(text)} bytes"
    sent = torch.tensor(list(text.ljust(_PLACE_BYTES)), dtype=torch.uint8, device=device)
    found = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, sent, group=group)
    return [json.loads(bytes(one.tolist())) for one in found]


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
