"""The persistent batch: what a rank keeps of every running row, on its device, between steps.

The driver sends changes only. Host mirrors hold what the host can know without asking the device (how far each row's KV
is planned); everything that depends on sampled tokens stays on the device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from shoal.workers.batch import AttentionMetadata, ForwardBatch
from shoal.workers.pending import to_device
from shoal.workers.plan import Int32, NewRow, SchedulerOutput


class BatchState:
    """Tokens, lengths and block tables of up to max_num_seqs rows."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.device = device
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.token_ids = zeros(max_num_seqs, max_model_len)
        self.num_prompt_tokens = zeros(max_num_seqs)
        self.num_tokens = zeros(max_num_seqs)  # prompt + generated so far
        self.block_tables = zeros(max_num_seqs, max_blocks)
        self.ended = torch.zeros(max_num_seqs, dtype=torch.bool, device=device)  # sampled one of its stop ids
        self.num_computed: Int32 = np.zeros(max_num_seqs, np.int32)  # host: tokens whose KV is computed or planned
        self.prompt_lens: Int32 = np.zeros(max_num_seqs, np.int32)  # host

    def apply(self, plan: SchedulerOutput) -> None:
        """Take in the plan's new rows and blocks."""
        if plan.new_rows:
            self._enter(plan.new_rows)
        if len(plan.block_ids):
            rows, positions = self._tensor(plan.block_rows).long(), self._tensor(plan.block_positions).long()
            self.block_tables[rows, positions] = self._tensor(plan.block_ids)

    def _enter(self, new_rows: list[NewRow]) -> None:
        """All at once, from pinned memory: a number set by itself is a copy that makes the host wait for the device."""
        rows = np.array([new.row for new in new_rows], np.int32)
        lengths = np.array([len(new.token_ids) for new in new_rows], np.int32)
        prompts = np.array([new.num_prompt_tokens for new in new_rows], np.int32)
        self.num_computed[rows] = [new.num_computed_tokens for new in new_rows]
        self.prompt_lens[rows] = prompts
        places = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        flat = np.stack([np.repeat(rows, lengths), places, np.concatenate([new.token_ids for new in new_rows])])
        flat_rows, flat_places, token_ids = self._tensor(flat)
        self.token_ids[flat_rows.long(), flat_places.long()] = token_ids
        index, length, prompt = self._tensor(np.stack([rows, lengths, prompts]))
        self.num_prompt_tokens[index.long()] = prompt
        self.num_tokens[index.long()] = length
        self.ended.index_fill_(0, index.long(), False)

    def forward_batch(self, rows: Int32, counts: Int32) -> ForwardBatch:
        """Input of a pass over the next counts[i] tokens of rows[i]; `advance` must follow."""
        starts = self.num_computed[rows]
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        flat_rows = np.repeat(rows, counts)
        flat_positions = np.arange(offsets[-1], dtype=np.int32) - np.repeat(offsets[:-1] - starts, counts)
        seq_lens = starts + counts
        max_seq_len = int(seq_lens.max())
        row_index = self._tensor(flat_rows).long()
        positions = self._tensor(flat_positions).long()
        blocks = self.block_tables[row_index, positions // self.block_size].long()
        batch_rows = self._tensor(rows).long()
        attention = AttentionMetadata(
            cu_seqlens_q=self._tensor(offsets),
            seq_lens=self._tensor(seq_lens),
            block_tables=self.block_tables[batch_rows, : -(-max_seq_len // self.block_size)],
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            block_size=self.block_size,
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
        )
        return ForwardBatch(self.token_ids[row_index, positions].long(), positions, attention)

    def advance(self, rows: Int32, counts: Int32) -> None:
        """The KV of the next counts[i] tokens of rows[i] is on its way."""
        self.num_computed[rows] += counts

    def append(self, rows: torch.Tensor, token_ids: torch.Tensor, ended: torch.Tensor) -> None:
        """Add sampled tokens ([n], of rows [n]) to their rows."""
        lengths = self.num_tokens[rows].long()
        self.token_ids[rows, lengths] = token_ids.to(torch.int32)
        self.num_tokens[rows] += 1
        self.ended[rows] |= ended

    def newest(self, rows: torch.Tensor) -> torch.Tensor:
        """int32 [3, n]: last token, number of tokens and whether it ended, of rows [n]."""
        lengths = self.num_tokens[rows]
        return torch.stack([self.token_ids[rows, lengths.long() - 1], lengths, self.ended[rows].to(torch.int32)])

    def adopt(self, rows: torch.Tensor, newest: torch.Tensor) -> None:
        """Become what `newest` said of rows [n] on another rank."""
        token_ids, lengths, ended = newest
        self.token_ids[rows, lengths.long() - 1] = token_ids
        self.num_tokens[rows] = lengths
        self.ended[rows] = ended.bool()

    def _tensor(self, values: npt.NDArray[np.int32]) -> torch.Tensor:
        return to_device(values, self.device)
