"""The token counts that repetition, frequency and presence penalties need, kept on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.workers.pending import to_device

_FIRST_SLOTS = 8


class PenaltyTable:
    """Token counts of the rows that ask for penalties, one slot [vocab] each; other rows cost nothing.

    An entry is 2 * (times generated) + (1 if the prompt has it). Slot 0 belongs to no row: it takes what `observe` is
    told of rows without a slot. The table grows by doubling and goes when its last row does.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._limit = max_num_seqs + 1
        self._table: Tensor | None = None  # int32 [slots, vocab]
        self._slot_of_row: dict[int, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._slot_of_row)

    def slot(self, row: int) -> int:
        """The row's slot, 0 if it has none."""
        return self._slot_of_row.get(row, 0)

    def fill(self, row: int, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int) -> None:
        """Gives the row a slot that holds the counts of these tokens (prompt, then output)."""
        if row not in self._slot_of_row:
            table = self._grown() if not self._free else self._table
            self._slot_of_row[row] = self._free.pop()
        else:
            table = self._table
        assert table is not None
        counts = table[self._slot_of_row[row]]
        ids = to_device(token_ids.astype(np.int64), self._device)
        counts.zero_()
        counts[ids[:num_prompt_tokens]] = 1
        output = ids[num_prompt_tokens:]
        counts.index_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))

    def drop(self, row: int) -> None:
        """Takes the row's slot back, if it has one."""
        if row not in self._slot_of_row:
            return
        self._free.append(self._slot_of_row.pop(row))
        if not self._slot_of_row:
            self._table = None
            self._free = []

    @property
    def table(self) -> Tensor:
        """All slots: int32 [slots, vocab]. Another tensor once the table has grown."""
        assert self._table is not None
        return self._table

    def observe(self, slots: Tensor, token_ids: Tensor) -> None:
        """Counts one generated token for each slot: both int64 [n]; a token id of -1 is none."""
        assert self._table is not None
        places = torch.where(token_ids >= 0, slots * self._vocab_size + token_ids, 0)
        twos = torch.full_like(places, 2, dtype=torch.int32)
        self._table.view(-1).index_add_(0, places, twos)

    def _grown(self) -> Tensor:
        old = 0 if self._table is None else self._table.shape[0]
        new = min(max(2 * old, _FIRST_SLOTS), self._limit)
        assert new > old
        table = torch.zeros(new, self._vocab_size, dtype=torch.int32, device=self._device)
        if self._table is not None:
            table[:old] = self._table
        self._table = table
        self._free = list(range(new - 1, max(old, 1) - 1, -1))
        return table
