"""Log-probabilities of tokens, from the model's untouched logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.ops.logprobs_of import logprobs_of
from shoal.kernels.ops.top_ids import top_ids
from shoal.workers.pending import to_device
from shoal.workers.plan import TokenLogprobs

_CPU_CHUNK = 1 << 20  # logits whose float32 copies stay in the cache
_DEVICE_CHUNK = 1 << 24  # logits to be ordered wholly: their int64 indices take 128 MiB


@dataclass(slots=True)
class LogprobRequest:
    """Rows of one batch that want logprobs and share a width."""

    places: list[int]  # among the batch's rows
    index: Tensor  # the same on the device, int64 [m]
    counts: list[int]  # best ids each row wants
    width: int  # the largest of them
    unused: Tensor  # bool [m, width + 1]: columns beyond what the row wants


@dataclass(slots=True)
class LogprobEntries:
    """TokenLogprobs on the device."""

    ids: Tensor  # int32 [m, k + 1]
    logprobs: Tensor  # float32 [m, k + 1]
    ranks: Tensor  # int32 [m]

    def to_host(self) -> TokenLogprobs:
        """The same as numpy arrays; waits for the device."""
        return TokenLogprobs(self.ids.cpu().numpy(), self.logprobs.cpu().numpy(), self.ranks.cpu().numpy())


@dataclass(slots=True)
class LogprobsTensors:
    """Logprobs of one step's tokens, still on the device."""

    parts: list[tuple[LogprobRequest, LogprobEntries]]

    def to_host(self) -> dict[int, TokenLogprobs]:
        """By place among the batch's rows: one token's entries, as many as the row wants. Waits for the device."""
        found = {}
        for request, entries in self.parts:
            host = entries.to_host()
            for i, (place, count) in enumerate(zip(request.places, request.counts, strict=True)):
                rows, columns = slice(i, i + 1), slice(count + 1)
                found[place] = TokenLogprobs(host.ids[rows, columns], host.logprobs[rows, columns], host.ranks[rows])
        return found


def plan_requests(wanted: list[tuple[int, int]], vocab_size: int, device: torch.device) -> list[LogprobRequest]:
    """Groups (place, number wanted; -1 for all) so that rows wanting a few do not pay for rows wanting everything."""
    groups: dict[bool, list[tuple[int, int]]] = {}
    for place, count in wanted:
        resolved = vocab_size if count == -1 else min(count, vocab_size)
        groups.setdefault(resolved == vocab_size, []).append((place, resolved))
    requests = []
    for members in groups.values():
        places = [place for place, _ in members]
        counts = [count for _, count in members]
        unused = np.arange(max(counts) + 1) > np.array(counts)[:, None]
        index = to_device(np.array(places, np.int64), device)
        requests.append(LogprobRequest(places, index, counts, max(counts), to_device(unused, device)))
    return requests


def gather_logprobs(logits: Tensor, token_ids: Tensor, requests: list[LogprobRequest]) -> LogprobsTensors:
    """Logprobs of `token_ids` (int64 [n]) under `logits` ([n, vocab], any float dtype), for the rows that asked."""
    parts = []
    for request in requests:
        chosen = token_ids[request.index]
        every = len(request.places) == logits.shape[0]
        entries = _score(logits, None if every else request.index, chosen, request.width)
        entries.ids.masked_fill_(request.unused, -1)
        parts.append((request, entries))
    return LogprobsTensors(parts)


def score_tokens(logits: Tensor, target_ids: Tensor, k: int) -> LogprobEntries:
    """Logprobs of target_ids (int64 [m]) and of the k best ids (-1: all) of each row of logits [m, vocab]."""
    vocab_size = logits.shape[1]
    return _score(logits, None, target_ids, vocab_size if k == -1 else min(k, vocab_size))


def _score(logits: Tensor, index: Tensor | None, target_ids: Tensor, width: int) -> LogprobEntries:
    """Entries for rows `index` (None: all of them, in order) of logits."""
    num_rows = target_ids.shape[0]
    entries = LogprobEntries(
        torch.empty(num_rows, width + 1, dtype=torch.int32, device=logits.device),
        torch.empty(num_rows, width + 1, dtype=torch.float32, device=logits.device),
        torch.empty(num_rows, dtype=torch.int32, device=logits.device),
    )
    for rows in _chunks(num_rows, logits, width):
        part = logits[rows] if index is None else logits[index[rows]]
        ids = target_ids[rows].unsqueeze(1)
        if width:
            ids = torch.cat([ids, top_ids(part, width)], dim=1)
        entries.ids[rows] = ids.to(torch.int32)
        entries.logprobs[rows], entries.ranks[rows] = logprobs_of(part, ids)
    return entries


def _chunks(num_rows: int, logits: Tensor, width: int) -> Iterator[slice]:
    """Few rows at a time where there are temporaries of the logits' size: on a CPU, and where much is to be ordered."""
    vocab_size, step = logits.shape[1], num_rows
    if logits.device.type == "cpu":
        step = max(1, _CPU_CHUNK // vocab_size)
    elif 2 * width > vocab_size:
        step = max(1, _DEVICE_CHUNK // vocab_size)
    for start in range(0, num_rows, max(1, step)):
        yield slice(start, start + step)
