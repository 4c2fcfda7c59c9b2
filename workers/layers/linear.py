"""Linear layers split over the ranks of a tensor-parallel group.

Weights are [out, in] as torch.nn.functional.linear wants them; `transposed=True` says that the checkpoint stores
[in, out] (GPT-2's Conv1D). Inputs and outputs are [num_tokens, features].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from shoal.kernels.ops.activation_and_mul import activation_and_mul
from shoal.kernels.ops.gated_linear import gated_linear
from shoal.kernels.ops.linear import linear
from shoal.kernels.ops.linear_add_norm import linear_add_norm
from shoal.workers.layers.parameter import WeightParameter, check_shape, copy_into, load_replicated

if TYPE_CHECKING:
    from shoal.workers.layers.norm import RMSNorm
    from shoal.workers.loading.base import TensorSource
    from shoal.workers.parallel import TensorParallel


class ReplicatedLinear(torch.nn.Module):
    """Every rank holds and computes the whole layer."""

    def __init__(self, input_size: int, output_size: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = WeightParameter((output_size, input_size), load_replicated)
        self.bias = WeightParameter((output_size,), load_replicated) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, input_size] -> [num_tokens, output_size]."""
        return linear(x, self.weight, self.bias)


class MergedColumnParallelLinear(torch.nn.Module):
    """Layers with one input, run as one; the outputs of each are split over the ranks.

    `output_sizes` are the whole layers' sizes. A rank's output is [num_tokens, sum of its parts], the parts in order.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        tp: TensorParallel,
        *,
        bias: bool,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_sizes = list(output_sizes)
        # [(first row of the checkpoint's part, rows this rank holds)]
        self.shards = [self._shard(index, size, tp) for index, size in enumerate(output_sizes)]
        self.transposed = transposed
        rows = sum(length for _, length in self.shards)
        num_shards = len(self.shards)
        self.weight = WeightParameter((rows, input_size), self._load, num_shards)
        self.bias = WeightParameter((rows,), self._load, num_shards) if bias else None

    def _shard(self, index: int, size: int, tp: TensorParallel) -> tuple[int, int]:
        assert size % tp.world_size == 0, f"{size} outputs over {tp.world_size} ranks"
        length = size // tp.world_size
        return tp.rank * length, length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, input_size] -> [num_tokens, this rank's outputs]."""
        return linear(x, self.weight, self.bias)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(first layer) * second layer, of two layers of one size -> [num_tokens, this rank's part]."""
        assert len(self.shards) == 2
        if self.bias is None:
            return gated_linear(x, self.weight, activation)
        return activation_and_mul(self(x), activation)

    def _load(self, param: WeightParameter, source: TensorSource, shard_id: int | None) -> None:
        """One part of the layer, or (shard_id None) a checkpoint's own fusion of all parts."""
        parts = list(range(len(self.shards))) if shard_id is None else [shard_id]
        flip = self.transposed and param.dim() == 2
        size = sum(self.output_sizes[part] for part in parts)
        check_shape(source, _shape(size, self.input_size, flip)[: 2 if param.dim() == 2 else 1])
        source_row = 0
        for part in parts:
            first, length = self.shards[part]
            tensor = source.narrow(1 if flip else 0, source_row + first, length)
            offset = sum(rows for _, rows in self.shards[:part])
            copy_into(param[offset : offset + length], tensor.t() if flip else tensor)
            source_row += self.output_sizes[part]


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One layer whose outputs are split over the ranks."""

    def __init__(
        self, input_size: int, output_size: int, tp: TensorParallel, *, bias: bool, transposed: bool = False
    ) -> None:
        super().__init__(input_size, [output_size], tp, bias=bias, transposed=transposed)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections as one layer, split by heads.

    With fewer KV heads than ranks each rank holds one of them, the same as its neighbours'.
    """

    def __init__(
        self,
        input_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        tp: TensorParallel,
        *,
        bias: bool,
        transposed: bool = False,
    ) -> None:
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        super().__init__(input_size, sizes, tp, bias=bias, transposed=transposed)

    def _shard(self, index: int, size: int, tp: TensorParallel) -> tuple[int, int]:
        if index == 0 or self.num_kv_heads >= tp.world_size:
            return super()._shard(index, size, tp)
        ranks_per_head = tp.world_size // self.num_kv_heads
        return tp.rank // ranks_per_head * self.head_dim, self.head_dim

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's output as query, key and value."""
        query, key, value = torch.split(x, [length for _, length in self.shards], dim=-1)
        return query, key, value


class RowParallelLinear(torch.nn.Module):
    """A layer whose inputs are split over the ranks; the output is the sum over them, the bias added once."""

    def __init__(
        self, input_size: int, output_size: int, tp: TensorParallel, *, bias: bool, transposed: bool = False
    ) -> None:
        super().__init__()
        assert input_size % tp.world_size == 0, f"{input_size} inputs over {tp.world_size} ranks"
        self.tp = tp
        self.input_size = input_size
        self.output_size = output_size
        self.transposed = transposed
        self.weight = WeightParameter((output_size, input_size // tp.world_size), self._load)
        self.bias = WeightParameter((output_size,), load_replicated) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, this rank's inputs] -> [num_tokens, output_size], the same on every rank."""
        if self.tp.world_size == 1:
            return linear(x, self.weight, self.bias)
        output = self.tp.all_reduce(linear(x, self.weight))
        return output if self.bias is None else output + self.bias

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm | None, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of s, s) with s = this layer's output * scale + residual; without a norm (s, s).

        residual [num_tokens, output_size] may be overwritten.
        """
        if norm is not None and scale == 1.0 and self.tp.world_size == 1 and self.bias is None:
            return linear_add_norm(x, self.weight, residual, norm.weight, norm.eps)
        peers = self.tp.peers
        if peers is not None and x.shape[0] <= peers.num_rows:
            return peers.linear_add_norm(x, self.weight, self.bias, residual, norm, scale)
        output: torch.Tensor = self(x)
        if scale != 1.0:
            output = output * scale
        if norm is not None:
            return norm.add(output, residual)
        output = output + residual
        return output, output

    def _load(self, param: WeightParameter, source: TensorSource, shard_id: int | None) -> None:
        assert shard_id is None
        check_shape(source, _shape(self.output_size, self.input_size, self.transposed))
        length = param.shape[1]
        tensor = source.narrow(0 if self.transposed else 1, self.tp.rank * length, length)
        copy_into(param, tensor.t() if self.transposed else tensor)


def _shape(outputs: int, inputs: int, transposed: bool) -> tuple[int, int]:
    return (inputs, outputs) if transposed else (outputs, inputs)
