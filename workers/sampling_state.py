"""What the sampler keeps of every row, and how the rows of a batch are sorted by what they ask for."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.workers.logit_edits import LogitEdits, build_edits, has_penalties
from shoal.workers.logits_processor import ProcessLogits, resolve_processors
from shoal.workers.logprobs import LogprobRequest, plan_requests
from shoal.workers.penalties import PenaltyTable
from shoal.workers.pending import to_device
from shoal.workers.plan import RowSampling

_SMALL_TOP_K = 1024  # up to here the k best are found without ordering the rest
_GROUP_ELEMENTS = 1 << 25  # float32 logits of a group: 128 MiB
_FLOAT_COLUMNS = 3  # temperature, log(min_p), top_p
_INT_COLUMNS = 4  # stream, top_k, min_tokens, penalty slot
_STOP_ID_COLUMNS = 4  # to begin with


class Mode(enum.IntEnum):
    """How a row's token is chosen."""

    GREEDY = 0
    RANDOM = 1  # from the whole distribution
    TOP_K = 2  # from at most _SMALL_TOP_K ids
    NUCLEUS = 3  # by top_p alone
    ORDERED = 4  # from more than _SMALL_TOP_K ids


@dataclass(slots=True)
class RowGroup:
    """Rows of a batch whose tokens are chosen together; m of them."""

    mode: Mode
    index: Tensor | None  # int64 [m], places among the batch's rows; None: all rows in order
    edits: LogitEdits | None
    temperature: Tensor  # float32 [m]
    log_min_p: Tensor | None  # float32 [m]
    top_p: Tensor  # float64 [m]
    top_k: Tensor  # int64 [m], vocab_size where off
    streams: Tensor  # int64 [m]
    max_top_k: int


@dataclass(slots=True)
class BatchPlan:
    """A batch's rows sorted by what they ask for; the same from step to step while its rows stay."""

    groups: list[RowGroup]
    logprobs: list[LogprobRequest]
    stop_ids: Tensor  # int64 [n, longest list], -1 where shorter
    min_tokens: Tensor  # int64 [n]


class SamplingState:
    """Sampling parameters of up to max_num_seqs rows.

    `logits_processors` holds LogitsProcessor classes or "module:Class" names; ValueError for anything else.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device, logits_processors: Sequence[Any] = ()
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.penalties = PenaltyTable(max_num_seqs, vocab_size, device)
        self._processors = [made(vocab_size, device) for made in resolve_processors(logits_processors)]
        self._samplings = [RowSampling(temperature=0.0)] * max_num_seqs
        self._functions: list[list[ProcessLogits]] = [[] for _ in range(max_num_seqs)]
        # Host tables; rows in _dirty are newer here than on the device.
        self._modes = np.zeros(max_num_seqs, np.int8)
        self._wants = np.zeros((max_num_seqs, 2), np.bool_)  # logit edits, logprobs
        self._floats = np.zeros((max_num_seqs, _FLOAT_COLUMNS))
        self._ints = np.zeros((max_num_seqs, _INT_COLUMNS), np.int64)
        self._stop_ids = np.full((max_num_seqs, _STOP_ID_COLUMNS), -1, np.int64)
        self._dirty: set[int] = set()
        self._device_floats = torch.zeros(max_num_seqs, _FLOAT_COLUMNS, dtype=torch.float64, device=device)
        self._device_ints = torch.zeros(max_num_seqs, _INT_COLUMNS, dtype=torch.int64, device=device)
        # What recorded graphs read, row by row of the persistent batch. stop_ids moves when a longer list comes.
        self.temperatures = torch.zeros(max_num_seqs, device=device)
        self.streams = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.min_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.stop_ids = torch.full((max_num_seqs, _STOP_ID_COLUMNS), -1, dtype=torch.int64, device=device)
        self._planned: tuple[list[int], BatchPlan] | None = None

    @property
    def has_processors(self) -> bool:
        """Whether there are custom logits processors."""
        return bool(self._processors)

    def add(self, row: int, sampling: RowSampling, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int) -> None:
        """Makes `row` a new request's, or again the same one's.

        token_ids: prompt and tokens generated so far. Whatever the row held before is forgotten.
        """
        sampling = self._within_vocabulary(sampling)
        self._samplings[row] = sampling
        made = (processor.for_request(dict(sampling.extra_args)) for processor in self._processors)
        self._functions[row] = [function for function in made if function is not None]
        if has_penalties(sampling):
            self.penalties.fill(row, token_ids, num_prompt_tokens)
        else:
            self.penalties.drop(row)
        top_k = sampling.top_k if 0 < sampling.top_k < self.vocab_size else self.vocab_size
        self._modes[row] = self._mode(sampling, top_k)
        self._wants[row] = (self._wants_edits(row), sampling.num_logprobs is not None)
        log_min_p = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
        self._floats[row] = (sampling.temperature, log_min_p, sampling.top_p)
        stream = sampling.stream - (1 << 64) if sampling.stream >> 63 else sampling.stream
        self._ints[row] = (stream, top_k, sampling.min_tokens, self.penalties.slot(row))
        self._set_stop_ids(row, sampling.stop_ids)
        self._dirty.add(row)
        self._planned = None

    def plan(self, rows: list[int]) -> BatchPlan:
        """What these rows (places in the persistent batch) ask for."""
        if self._planned is None or self._planned[0] != rows:
            self._flush()
            self._planned = (list(rows), self._make_plan(np.array(rows, np.int64)))
        return self._planned[1]

    def is_plain(self, rows: npt.NDArray[np.int32]) -> bool:
        """Whether all these rows ask for no more than a temperature; the device's tables are then up to date."""
        self._flush()
        modes, unfiltered = self._modes[rows], self._floats[rows, 1] == -math.inf
        return bool(((modes <= Mode.RANDOM) & unfiltered & ~self._wants[rows].any(axis=1)).all())

    def observe(self, rows: Tensor, token_ids: Tensor) -> None:
        """Counts a generated token for each row (both int64 [n]); -1 is none. Free while no row has penalties."""
        if len(self.penalties):
            self._flush()
            self.penalties.observe(self._device_ints[rows, 3], token_ids)

    def _within_vocabulary(self, sampling: RowSampling) -> RowSampling:
        """Without stop ids that no token can have: tokenizers know more ids than some models do."""
        stop_ids = tuple(i for i in sampling.stop_ids if 0 <= i < self.vocab_size)
        bias_ids = [token_id for token_id, _ in sampling.logit_bias]
        bad_ids = [token_id for word in sampling.bad_words for token_id in word]
        assert all(0 <= i < self.vocab_size for i in (*sampling.allowed_token_ids, *bias_ids, *bad_ids))
        return replace(sampling, stop_ids=stop_ids)

    @staticmethod
    def _mode(sampling: RowSampling, top_k: int) -> Mode:
        if sampling.temperature == 0.0:
            return Mode.GREEDY
        if 0 < sampling.top_k == top_k <= _SMALL_TOP_K:
            return Mode.TOP_K
        if sampling.top_k == top_k:
            return Mode.ORDERED
        return Mode.NUCLEUS if sampling.top_p < 1.0 else Mode.RANDOM

    def _wants_edits(self, row: int) -> bool:
        s = self._samplings[row]
        lists = s.allowed_token_ids or s.bad_words or s.logit_bias or self._functions[row]
        return bool(lists) or s.min_tokens > 0 or has_penalties(s)

    def _set_stop_ids(self, row: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self._stop_ids.shape[1]
        if missing > 0:
            self._stop_ids = np.pad(self._stop_ids, ((0, 0), (0, missing)), constant_values=-1)
            more = torch.full((len(self._stop_ids), missing), -1, dtype=torch.int64, device=self.device)
            self.stop_ids = torch.cat([self.stop_ids, more], dim=1)
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(stop_ids)] = stop_ids

    def _flush(self) -> None:
        """Brings the device's tables up to date."""
        if not self._dirty:
            return
        rows = np.array(sorted(self._dirty), np.int64)
        index = to_device(rows, self.device)
        floats, ints = to_device(self._floats[rows], self.device), to_device(self._ints[rows], self.device)
        self._device_floats[index] = floats
        self._device_ints[index] = ints
        self.temperatures[index] = floats[:, 0].to(torch.float32)
        self.streams[index] = ints[:, 0]
        self.min_tokens[index] = ints[:, 2]
        self.stop_ids[index] = to_device(self._stop_ids[rows], self.device)
        self._dirty.clear()

    def _make_plan(self, rows: npt.NDArray[np.int64]) -> BatchPlan:
        modes, edited = self._modes[rows], self._wants[rows, 0]
        # Greedy rows without edits need no float32 copy: they stay apart from those with, and whole.
        plain = np.flatnonzero((modes == Mode.GREEDY) & ~edited)
        groups = [self._group(Mode.GREEDY, plain, rows)] if len(plain) else []
        size = max(1, _GROUP_ELEMENTS // self.vocab_size)
        for mode in Mode:
            places = np.flatnonzero((modes == mode) & (edited | (mode != Mode.GREEDY)))
            groups += [self._group(mode, places[i : i + size], rows) for i in range(0, len(places), size)]
        wanted = [(int(p), self._samplings[rows[p]].num_logprobs) for p in np.flatnonzero(self._wants[rows, 1])]
        index = to_device(rows, self.device)
        return BatchPlan(
            groups,
            plan_requests([(p, k) for p, k in wanted if k is not None], self.vocab_size, self.device),
            self.stop_ids[index],
            self._device_ints[index, 2],
        )

    def _group(self, mode: Mode, places: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> RowGroup:
        members = rows[places]
        device_rows = to_device(members, self.device)
        floats, ints = self._device_floats[device_rows], self._device_ints[device_rows]
        edits = None
        if self._wants[members, 0].any():
            batch_rows = members.tolist()
            samplings = [self._samplings[row] for row in batch_rows]
            functions = [self._functions[row] for row in batch_rows]
            edits = build_edits(batch_rows, samplings, functions, self.penalties, self.device)
        return RowGroup(
            mode=mode,
            index=None if len(places) == len(rows) else to_device(places, self.device),
            edits=edits,
            temperature=floats[:, 0].to(torch.float32),
            log_min_p=floats[:, 1].to(torch.float32) if (self._floats[members, 1] > -math.inf).any() else None,
            top_p=floats[:, 2].contiguous(),
            top_k=ints[:, 1].contiguous(),
            streams=ints[:, 0].contiguous(),
            max_top_k=int(self._ints[members, 1].max()),
        )
