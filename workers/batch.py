"""The tensors of one forward pass, as the model and its attention layers see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class AttentionMetadata:
    """Where each row's queries, keys and values are. Rows are packed: no padding between them."""

    cu_seqlens_q: torch.Tensor  # int32 [num_rows + 1], offsets of the rows' query tokens
    seq_lens: torch.Tensor  # int32 [num_rows], context length including this pass's tokens
    block_tables: (
        torch.Tensor
    )  # int32 [num_rows, max_blocks], ids of KV blocks; entries past a row's need are undefined
    slot_mapping: torch.Tensor  # int64 [num_tokens], block_id * block_size + offset where each token's K and V go
    block_size: int
    max_query_len: int
    max_seq_len: int  # an upper bound of seq_lens

    @property
    def num_rows(self) -> int:
        """Rows of this pass."""
        return self.seq_lens.shape[0]


@dataclass(slots=True)
class ForwardBatch:
    """Input of one forward pass."""

    input_ids: torch.Tensor  # int64 [num_tokens]
    positions: torch.Tensor  # int64 [num_tokens]
    attention: AttentionMetadata
    hidden: torch.Tensor | None = None  # [num_tokens, hidden]: what the pipeline stage before made of the ids
    halves: tuple[ForwardBatch, ForwardBatch] | None = None  # the first rows and the rest, where sums can be hidden
