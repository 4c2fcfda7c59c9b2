"""TensorParallel: the ranks that share each layer, and what they tell each other."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from shoal.workers.peers import PeerMemory


class TensorParallel:
    """This rank's place among the ranks, passed to each layer. Alone (world_size 1) it does nothing."""

    def __init__(self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self.peers: PeerMemory | None = None  # where the ranks' GPUs reach each other's memory

    @classmethod
    def init(
        cls, rank: int, world_size: int, init_method: str, device: str, timeout_s: float, num_stages: int = 1
    ) -> TensorParallel:
        """Join the process group: gloo for device "cpu", NCCL for "cuda". Alone, no group is made.

        `init_method` is torch's ("tcp://host:port", "file:///path"). A rank that waits longer than `timeout_s` for the
        others, here or in a collective, raises (NCCL: its watchdog ends the process). `num_stages` pipeline stages cut
        the world into as many groups of consecutive ranks; the result is this rank's place in its own.
        """
        if world_size == 1:
            return cls()
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        if num_stages == 1:
            return cls(rank, world_size, dist.group.WORLD)
        size = world_size // num_stages
        assert size * num_stages == world_size, (world_size, num_stages)
        # Every rank takes part in the making of every group.
        groups = (
            [dist.new_group(range(first, first + size)) for first in range(0, world_size, size)] if size > 1 else []
        )
        return cls(rank % size, size, groups[rank // size] if groups else None)

    def destroy(self) -> None:
        """Leave the process groups; safe to call twice."""
        self.group = self.peers = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def open_peers(self, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Sum through the GPUs' own memory, where that works, in steps of up to `rows` tokens of `size` values."""
        if self.group is not None and device.type == "cuda":
            from shoal.workers.peers import PeerMemory

            self.peers = PeerMemory.open(self.group, rows, size, dtype, device)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, any shape. The input may be overwritten."""
        if self.world_size > 1:
            if self.peers is not None and (summed := self.peers.all_reduce(tensor)) is not None:
                return summed
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest over the ranks, element by element. The input is overwritten."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The ranks' tensors (equal shapes) side by side along `dim`, in rank order."""
        if self.world_size == 1:
            return tensor
        parts = tensor.new_empty(self.world_size * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts.chunk(self.world_size), dim)
