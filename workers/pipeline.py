"""Pipeline stages: which layers a rank holds, and what travels between stages.

Rank r is place r % tp of stage r // tp. Hidden states go from each place to the same place of the next stage; what the
last stage sampled goes back to that place in every other stage, since all of them keep the batch's state. Both travel
in the order of the plans, each over a process group of its own, so neither waits for the other. The tokens of a plan
are asked for at once and waited for only when a later plan runs one of their rows: until then a stage works on others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from shoal.workers.pending import to_device
from shoal.workers.plan import Int32

if TYPE_CHECKING:
    from shoal.workers.state import BatchState

_MOST_SENDS = 64  # kept alive while on their way; the oldest have long been received


@dataclass(frozen=True, slots=True)
class Stage:
    """One of `count` consecutive parts of a model's layers."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether it embeds the tokens."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it has the head, and samples."""
        return self.index == self.count - 1


WHOLE = Stage()


class Pipeline:
    """This rank's links to its place in the other stages. With one stage it does nothing."""

    def __init__(self, stage: Stage = WHOLE, ranks: Sequence[int] = (0,), groups: Sequence[Any] = ()) -> None:
        self.stage = stage
        self._ranks = list(ranks)  # by stage, of this place
        self._groups = list(groups)  # hidden states; samples
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
        self._expected: deque[tuple[Int32, torch.Tensor, Any]] = deque()

    @classmethod
    def init(cls, stage: Stage, place: int, tp: int, device: torch.device) -> Pipeline:
        """Make the groups; every rank of the world calls this at the same point."""
        if stage.count == 1:
            return cls()
        groups = [dist.new_group(), dist.new_group()]
        pipeline = cls(stage, [index * tp + place for index in range(stage.count)], groups)
        pipeline._greet(device)
        return pipeline

    def _greet(self, device: torch.device) -> None:
        """Use each link once, in an order that cannot lock up: NCCL connects two ranks when both first use theirs."""
        word = torch.zeros(1, device=device)
        if not self.stage.first:
            dist.recv(word, self._ranks[self.stage.index - 1], group=self._groups[0])
        if not self.stage.last:
            dist.send(word, self._ranks[self.stage.index + 1], group=self._groups[0])
            dist.recv(word, self._ranks[-1], group=self._groups[1])
        else:
            for rank in self._ranks[:-1]:
                dist.send(word, rank, group=self._groups[1])

    # ---- hidden states -----------------------------------------------------------------------------------------

    def send(self, hidden: torch.Tensor) -> None:
        """To the next stage. A copy travels: the tensor may be one that the next pass writes to."""
        self._send(
            hidden.clone(memory_format=torch.contiguous_format), self._ranks[self.stage.index + 1], self._groups[0]
        )

    def receive(self, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[num_tokens, width] from the stage before."""
        hidden = torch.empty(num_tokens, width, dtype=dtype, device=device)
        dist.recv(hidden, self._ranks[self.stage.index - 1], group=self._groups[0])
        return hidden

    # ---- samples -----------------------------------------------------------------------------------------------

    def give_back(self, rows: Int32, state: BatchState) -> None:
        """Last stage: tell the others what these rows have become."""
        if self.stage.count > 1:
            newest = state.newest(to_device(rows.astype(np.int64), state.device))
            for rank in self._ranks[:-1]:
                self._send(newest, rank, self._groups[1])

    def expect(self, rows: Int32, state: BatchState) -> None:
        """Earlier stages: ask for what `give_back` will send for these rows."""
        values = torch.empty(3, len(rows), dtype=torch.int32, device=state.device)
        self._expected.append((rows, values, dist.irecv(values, self._ranks[-1], group=self._groups[1])))

    def settle(self, rows: Int32, state: BatchState) -> None:
        """Bring these rows of the state up to date: wait for what was asked for, as far as it concerns them."""
        due = 0
        for index, (expected, _, _) in enumerate(self._expected, 1):
            if np.isin(expected, rows).any():
                due = index
        for _ in range(due):
            expected, values, work = self._expected.popleft()
            work.wait()
            state.adopt(to_device(expected.astype(np.int64), state.device), values)

    def _send(self, tensor: torch.Tensor, rank: int, group: Any) -> None:
        self._sends.append((dist.isend(tensor, rank, group=group), tensor))
        if len(self._sends) > _MOST_SENDS:
            self._sends.popleft()[0].wait()
