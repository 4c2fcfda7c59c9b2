"""Changes that some rows want made to their logits before a token is chosen.

Edits are built once for a set of rows, from the rows' parameters on the host, and then applied step after step on the
device with nothing from the host in between (custom processors excepted). They touch only the rows that ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.ops.penalise import penalise
from shoal.workers.logits_processor import ProcessLogits
from shoal.workers.penalties import PenaltyTable
from shoal.workers.pending import to_device
from shoal.workers.plan import RowSampling

_FORCED = 1e30  # in place of +inf from a custom processor: certain, and still a number after any temperature


class BatchTokens(Protocol):
    """The persistent batch's tokens, on the device."""

    token_ids: Tensor  # int32 [max_num_seqs, max_model_len]
    num_prompt_tokens: Tensor  # int32 [max_num_seqs]
    num_tokens: Tensor  # int32 [max_num_seqs], prompt and generated so far


@dataclass(slots=True)
class EditContext:
    """Where the rows being edited stand."""

    batch: BatchTokens
    rows: Tensor  # int64 [m], places in the persistent batch
    generated: Tensor  # int64 [m], tokens generated so far


class Edit(Protocol):
    """One kind of change. `apply` may write into `logits` (float32 [m, vocab], the caller's own copy)."""

    def apply(self, logits: Tensor, context: EditContext) -> None:
        """Makes the change."""


@dataclass(slots=True)
class Entries:
    """(row among the edited rows, vocabulary id) pairs: int64 [e] each."""

    rows: Tensor
    ids: Tensor

    @classmethod
    def of(cls, lists: Iterable[tuple[int, Sequence[int]]], device: torch.device) -> Entries:
        """The pairs of (row, its ids)."""
        pairs = [(row, token_id) for row, ids in lists for token_id in ids]
        both = to_device(np.array(pairs, np.int64).reshape(-1, 2).T.copy(), device)
        return cls(both[0], both[1])

    def add(self, logits: Tensor, values: Tensor) -> None:
        """Adds values (float32 [e]); an id may stand in several entries, and -inf stays -inf."""
        logits.index_put_((self.rows, self.ids), values, accumulate=True)


@dataclass(slots=True)
class AllowOnly:
    """allowed_token_ids: -inf everywhere else."""

    rows: Tensor  # int64 [a]
    entries: Entries

    def apply(self, logits: Tensor, context: EditContext) -> None:
        """See Edit."""
        kept = logits[self.entries.rows, self.entries.ids]
        logits[self.rows] = -torch.inf
        logits[self.entries.rows, self.entries.ids] = kept


@dataclass(slots=True)
class MaskIds:
    """Bad words of one token: always -inf."""

    entries: Entries

    def apply(self, logits: Tensor, context: EditContext) -> None:
        """See Edit."""
        logits[self.entries.rows, self.entries.ids] = -torch.inf


@dataclass(slots=True)
class MaskAfterPrefix:
    """Bad words of several tokens: the last one is -inf while the output ends in all the others."""

    entries: Entries  # the last tokens, [w]
    prefixes: Tensor  # int32 [w, longest], right-aligned
    lengths: Tensor  # int64 [w]

    def apply(self, logits: Tensor, context: EditContext) -> None:
        """See Edit."""
        rows = context.rows[self.entries.rows]
        longest = self.prefixes.shape[1]
        offsets = torch.arange(-longest, 0, device=rows.device)
        places = (context.batch.num_tokens[rows].unsqueeze(1) + offsets).clamp_(min=0)
        tail = context.batch.token_ids[rows.unsqueeze(1), places]
        same = (tail == self.prefixes) | (offsets < -self.lengths.unsqueeze(1))
        # The history is output alone: a prefix that reaches into the prompt does not count.
        matched = same.all(dim=1) & (context.generated[self.entries.rows] >= self.lengths)
        self.entries.add(logits, torch.where(matched, -torch.inf, 0.0))


@dataclass(slots=True)
class MaskUntil:
    """min_tokens: ids that are -inf until so many tokens are generated."""

    entries: Entries
    min_tokens: Tensor  # int64 [e]

    def apply(self, logits: Tensor, context: EditContext) -> None:
        """See Edit."""
        early = context.generated[self.entries.rows] < self.min_tokens
        self.entries.add(logits, torch.where(early, -torch.inf, 0.0))


@dataclass(slots=True)
class AddBias:
    """logit_bias."""

    entries: Entries
    values: Tensor  # float32 [e]

    def apply(self, logits: Tensor, context: EditContext) -> None:
        """See Edit."""
        self.entries.add(logits, self.values)


@dataclass(slots=True)
class Penalise:
    """repetition_penalty, frequency_penalty, presence_penalty."""

    rows: Tensor  # int64 [p]
    slots: Tensor  # int64 [p]
    table: PenaltyTable
    penalties: Tensor  # float32 [3, p]: repetition, frequency, presence

    def apply(self, logits: Tensor, context: EditContext) -> None:
        """See Edit."""
        penalise(logits, self.rows, self.table.table, self.slots, self.penalties)


@dataclass(slots=True)
class RunProcessors:
    """Custom logits processors. They take Python lists, so this edit waits for the device."""

    functions: list[tuple[int, list[ProcessLogits]]]  # by row among the edited rows

    def apply(self, logits: Tensor, context: EditContext) -> None:
        """See Edit. ValueError where a processor returns something that is not the row's logits."""
        batch = context.batch
        for index, functions in self.functions:
            row = int(context.rows[index])
            tokens = batch.token_ids[row, : int(batch.num_tokens[row])].tolist()
            num_prompt = int(batch.num_prompt_tokens[row])
            changed = logits[index].clone()
            for function in functions:
                changed = function(tokens[:num_prompt], tokens[num_prompt:], changed)
                if not isinstance(changed, Tensor) or changed.shape != logits[index].shape:
                    shown = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                    raise ValueError(
                        f"logits processor {function!r} must return a tensor of shape {tuple(logits[index].shape)}, "
                        f"got {shown}"
                    )
            logits[index] = changed.to(torch.float32).clamp(max=_FORCED)


@dataclass(slots=True)
class LogitEdits:
    """All edits of a set of rows, in the order in which the contract puts them."""

    allow: AllowOnly | None
    edits: list[Edit]
    masked_rows: Tensor | None  # int64 [f], the rows in which an edit could leave nothing

    def apply(self, logits: Tensor, context: EditContext) -> Tensor | None:
        """Edits logits (float32 [m, vocab]) in place.

        Returns int64 [m]: the id to take where every id ended up -inf (the best of those that allowed_token_ids
        leaves, all other edits aside), -1 elsewhere; None where no edit could do that.
        """
        if self.allow is not None:
            self.allow.apply(logits, context)
        best = None if self.masked_rows is None else logits[self.masked_rows].argmax(dim=-1)
        for edit in self.edits:
            edit.apply(logits, context)
        if self.masked_rows is None or best is None:
            return None
        forced = torch.full_like(context.rows, -1)
        nothing_left = logits[self.masked_rows].amax(dim=-1) == -torch.inf
        forced[self.masked_rows] = torch.where(nothing_left, best, -1)
        return forced


def has_penalties(sampling: RowSampling) -> bool:
    """Whether the row needs token counts."""
    return (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1.0, 0.0, 0.0)


def build_edits(
    rows: list[int],
    samplings: list[RowSampling],
    processors: list[list[ProcessLogits]],
    table: PenaltyTable,
    device: torch.device,
) -> LogitEdits | None:
    """The edits of these rows of the persistent batch, or None if none wants any. Host work only, plus small copies."""
    every = list(enumerate(samplings))
    allow = None
    if allowing := [(i, s.allowed_token_ids) for i, s in every if s.allowed_token_ids]:
        allow = AllowOnly(_index([i for i, _ in allowing], device), Entries.of(allowing, device))
    edits = _mask_edits(every, device)
    if biased := [(i, s.logit_bias) for i, s in every if s.logit_bias]:
        values = to_device(np.array([value for _, bias in biased for _, value in bias], np.float32), device)
        edits.append(AddBias(Entries.of([(i, [t for t, _ in bias]) for i, bias in biased], device), values))
    if penalised := [(i, s) for i, s in every if has_penalties(s)]:
        numbers = [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for _, s in penalised]
        slots = _index([table.slot(rows[i]) for i, _ in penalised], device)
        penalties = to_device(np.array(numbers, np.float32).T.copy(), device)
        edits.append(Penalise(_index([i for i, _ in penalised], device), slots, table, penalties))
    if custom := [(i, functions) for i, functions in enumerate(processors) if functions]:
        edits.append(RunProcessors(custom))
    if allow is None and not edits:
        return None
    masked = [i for i, s in every if s.bad_words or s.min_tokens or processors[i]]
    return LogitEdits(allow, edits, _index(masked, device) if masked else None)


def _mask_edits(every: list[tuple[int, RowSampling]], device: torch.device) -> list[Edit]:
    edits: list[Edit] = []
    if single := [(i, [w[0] for w in s.bad_words if len(w) == 1]) for i, s in every if s.bad_words]:
        edits.append(MaskIds(Entries.of(single, device)))
    if words := [(i, w) for i, s in every for w in s.bad_words if len(w) > 1]:
        prefixes = np.zeros((len(words), max(len(w) for _, w in words) - 1), np.int32)
        for prefix, (_, word) in zip(prefixes, words, strict=True):
            prefix[len(prefix) - len(word) + 1 :] = word[:-1]
        lengths = _index([len(w) - 1 for _, w in words], device)
        last = Entries.of([(i, [w[-1]]) for i, w in words], device)
        edits.append(MaskAfterPrefix(last, to_device(prefixes, device), lengths))
    if until := [(i, sorted(s.stop_ids), s.min_tokens) for i, s in every if s.min_tokens]:
        entries = Entries.of([(i, ids) for i, ids, _ in until], device)
        edits.append(MaskUntil(entries, _index([least for _, ids, least in until for _ in ids], device)))
    return edits


def _index(values: list[int], device: torch.device) -> Tensor:
    return to_device(np.array(values, np.int64), device)
