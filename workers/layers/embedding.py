"""Token embeddings and the output head, split over the ranks by vocabulary; learned positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import embedding

from shoal.kernels.ops.embed import embed
from shoal.kernels.ops.linear import linear
from shoal.workers.layers.parameter import WeightParameter, check_shape, copy_into, load_replicated

if TYPE_CHECKING:
    from shoal.workers.loading.base import TensorSource
    from shoal.workers.parallel import TensorParallel

VOCAB_ALIGNMENT = 64  # rows of a rank's part are a multiple: any vocabulary splits, and GPUs get aligned matrices


class VocabParallelEmbedding(torch.nn.Module):
    """Rows of the embedding table, padded so that each rank holds the same number; padding is zero."""

    def __init__(self, vocab_size: int, embedding_dim: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        unit = VOCAB_ALIGNMENT * tp.world_size
        self.rows = -(-vocab_size // unit) * VOCAB_ALIGNMENT
        self.first = tp.rank * self.rows
        self.weight = WeightParameter((self.rows, embedding_dim), self._load)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [num_tokens] -> [num_tokens, embedding_dim], the same on every rank. Ids are < vocab_size."""
        output = embed(input_ids, self.weight, self.first)
        return output if self.tp.world_size == 1 else self.tp.all_reduce(output)

    def _load(self, param: WeightParameter, source: TensorSource, shard_id: int | None) -> None:
        assert shard_id is None
        check_shape(source, (self.vocab_size, self.embedding_dim))
        length = max(0, min(self.rows, self.vocab_size - self.first))
        if length:
            copy_into(param[:length], source.narrow(0, self.first, length))
        param.data[length:].zero_()


class ParallelLMHead(VocabParallelEmbedding):
    """The output projection: the same split of the vocabulary; `tie` shares an embedding's weights."""

    def __init__(
        self, vocab_size: int, embedding_dim: int, tp: TensorParallel, *, tie: VocabParallelEmbedding | None = None
    ) -> None:
        if tie is None:
            super().__init__(vocab_size, embedding_dim, tp)
            return
        torch.nn.Module.__init__(self)
        self.tp = tp
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.rows, self.first, self.weight = tie.rows, tie.first, tie.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, embedding_dim] -> logits of this rank's part of the vocabulary, [n, rows]."""
        return linear(hidden, self.weight)

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """The ranks' parts [n, rows] -> logits [n, vocab_size], whole on every rank."""
        return self.tp.all_gather(logits)[:, : self.vocab_size]

    @property
    def num_ids(self) -> int:
        """Ids of this rank's part, `first` the first of them; the other rows are padding."""
        return max(0, min(self.rows, self.vocab_size - self.first))


class LearnedPositions(torch.nn.Module):
    """A table of positions, looked up at position + offset."""

    def __init__(self, num_positions: int, embedding_dim: int, *, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset
        self.weight = WeightParameter((num_positions + offset, embedding_dim), load_replicated)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 [num_tokens] -> [num_tokens, embedding_dim]."""
        return embedding(positions + self.offset, self.weight)
