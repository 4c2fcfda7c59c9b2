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
    rows_decode_apart: bool = False  # every row has one token, and reads nothing that another row writes in this pass

    def of_last_tokens(self, rows: torch.Tensor) -> AttentionMetadata:
        """The same pass seen by the last query token of each of these rows (int64 [n]), their keys already stored."""
        starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
        none = self.slot_mapping[:0]
        tables = self.block_tables[rows]
        return AttentionMetadata(starts, self.seq_lens[rows], tables, none, self.block_size, 1, self.max_seq_len)

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
    sampling_rows: torch.Tensor | None = None  # int64 [n]: only their last tokens' hidden states are wanted; None: all

    @property
    def sampling_tokens(self) -> torch.Tensor:
        """int64 [n]: where those tokens are."""
        assert self.sampling_rows is not None
        return self.attention.cu_seqlens_q[1:][self.sampling_rows].long() - 1

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """Of [num_tokens, size] what is wanted."""
        return x if self.sampling_rows is None else x[self.sampling_tokens]
