"""Choosing a token from logits: the torch reference.

Random rows take the argmax of logits / temperature + Gumbel noise, which is a draw from the softmax; the noise comes
from philox.py and knows nothing of the batch. Everything that decides which ids a row may draw from is computed so
that a row's answer is the same in any batch: ties go to the lowest id, and sums whose rounding could move a top-p
boundary are taken in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.op import Op
from shoal.kernels.ops.philox import gumbel_noise, gumbel_noise_at

_ARGMAX_BLOCK = 512
_FIRST_CANDIDATES = 256  # a nucleus of this size covers most rows of a language model
_CANDIDATE_GROWTH = 4
_DEVICE_CHUNK = 1 << 23  # elements; a dozen int64 temporaries of this size stay below 1 GiB
_CPU_CHUNK = 1 << 18  # elements a thread; temporaries stay in its cache


def _greedy(logits: Tensor) -> Tensor:
    """The most likely id of each row, the lowest one among equals: int64 [n] from [n, vocab] of any float dtype."""
    vocab_size = logits.shape[1]
    whole = vocab_size - vocab_size % _ARGMAX_BLOCK
    if logits.device.type != "cpu" or whole <= _ARGMAX_BLOCK:
        return logits.argmax(dim=-1)
    # torch's CPU argmax does not vectorise; its amax does. Best block first, then the place in it.
    best = logits[:, :whole].reshape(-1, whole // _ARGMAX_BLOCK, _ARGMAX_BLOCK).amax(dim=-1)
    if whole < vocab_size:
        best = torch.cat([best, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=1)
    places = best.argmax(dim=-1, keepdim=True) * _ARGMAX_BLOCK + torch.arange(_ARGMAX_BLOCK)
    places.clamp_(max=vocab_size - 1)  # repeats of the last id stand behind it
    return places.gather(1, logits.gather(1, places).argmax(dim=-1, keepdim=True)).squeeze(1)


def _sample(
    logits: Tensor, temperature: Tensor, log_min_p: Tensor | None, streams: Tensor, positions: Tensor
) -> Tensor:
    """A draw from softmax(logits / temperature), ids below min_p of the best left out: int64 [n].

    logits: [n, vocab], any float dtype. temperature: float32 [n], above 0. log_min_p: float32 [n], log of min_p
    (-inf: off), or None where no row has one. streams, positions: int64 [n], see philox.py.
    """
    chosen = []
    for rows in _row_chunks(logits):
        scores = _scaled(logits[rows], temperature[rows], None if log_min_p is None else log_min_p[rows])
        chosen.append((scores + gumbel_noise(streams[rows], positions[rows], logits.shape[1])).argmax(dim=-1))
    return torch.cat(chosen)


def _sample_filtered(
    logits: Tensor,
    temperature: Tensor,
    log_min_p: Tensor | None,
    top_k: Tensor,
    top_p: Tensor,
    streams: Tensor,
    positions: Tensor,
    max_top_k: int | None = None,
) -> Tensor:
    """As `sample`, from the top_k likeliest ids and, of their renormalised probabilities, the fewest that reach top_p.

    top_k: int64 [n], at most vocab, which means off. top_p: float64 [n], 1 means off. max_top_k: where every row has a
    top_k, a number that none exceeds; it saves ordering the rest of the vocabulary. At least one id is always left.
    """
    chosen = []
    for rows in _row_chunks(logits):
        scores = _scaled(logits[rows], temperature[rows], None if log_min_p is None else log_min_p[rows])
        limits = (top_k[rows], top_p[rows], streams[rows], positions[rows])
        if max_top_k is not None:
            chosen.append(_draw_from_best(scores, *limits, None, min(max_top_k, scores.shape[1]))[0])
        else:
            chosen.append(_draw_from_nucleus(scores, *limits))
    return torch.cat(chosen)


def _sample_nucleus(
    logits: Tensor,
    temperature: Tensor,
    log_min_p: Tensor | None,
    top_p: Tensor,
    streams: Tensor,
    positions: Tensor,
) -> Tensor:
    """As `sample`, from the fewest ids that reach top_p of all probability. top_p: float64 [n], below 1."""
    top_k = torch.full_like(positions, logits.shape[1])
    return _sample_filtered(logits, temperature, log_min_p, top_k, top_p, streams, positions)


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest values of each row, best first, lower ids first among equals.

    logits: float32 [n, vocab]. Returns (values float32 [n, k], ids int64 [n, k]).
    """
    vocab_size = logits.shape[1]
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # an integer that orders as the float does
    keys = ordered.to(torch.int64) << 32
    keys += torch.arange(vocab_size - 1, -1, -1, device=logits.device)  # all keys differ: no ties are left to torch
    best = keys.topk(k, dim=-1).values if 2 * k <= vocab_size else keys.sort(dim=-1, descending=True).values[:, :k]
    ids = vocab_size - 1 - (best & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


def _scaled(logits: Tensor, temperature: Tensor, log_min_p: Tensor | None) -> Tensor:
    scores = logits.to(torch.float32) / temperature.unsqueeze(1)
    if log_min_p is not None:
        floor = scores.amax(dim=-1) + log_min_p
        scores.masked_fill_(scores < floor.unsqueeze(1), -torch.inf)
    return scores


def _draw_from_nucleus(scores: Tensor, top_k: Tensor, top_p: Tensor, streams: Tensor, positions: Tensor) -> Tensor:
    """sample_filtered where some row has no top_k to bound what must be sorted."""
    vocab_size = scores.shape[1]
    mass = (scores - scores.amax(dim=-1, keepdim=True)).exp_().sum(dim=-1, dtype=torch.float64)
    if scores.device.type != "cpu":  # asking whether fewer candidates are enough would wait for the device
        return _draw_from_best(scores, top_k, top_p, streams, positions, mass, vocab_size)[0]
    chosen = torch.empty_like(top_k)
    pending = torch.arange(scores.shape[0])
    num_candidates = min(_FIRST_CANDIDATES, vocab_size)
    while True:
        limits = (top_k[pending], top_p[pending], streams[pending], positions[pending])
        ids, covered = _draw_from_best(scores[pending], *limits, mass[pending], num_candidates)
        chosen[pending[covered]] = ids[covered]
        pending = pending[~covered]
        if pending.numel() == 0:
            return chosen
        num_candidates = min(num_candidates * _CANDIDATE_GROWTH, vocab_size)


def _draw_from_best(
    scores: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    streams: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    num_candidates: int,
) -> tuple[Tensor, Tensor]:
    """Draws from the first `num_candidates` ids: (ids int64 [n], bool [n]: no id beyond them could have been kept).

    mass: float64 [n], the sum of exp(score - best score) over the vocabulary; None where every row's top_k is at most
    num_candidates.
    """
    vocab_size = scores.shape[1]
    values, ids = top_candidates(scores, num_candidates)
    weights = (values - values[:, :1]).exp_().to(torch.float64)
    in_top_k = torch.arange(num_candidates, device=scores.device) < top_k.unsqueeze(1)
    reached = (weights * in_top_k).cumsum(dim=-1)
    total = reached[:, -1]
    bounded = top_k <= num_candidates
    if mass is not None:
        total = torch.where(bounded, total, mass)
    needed = torch.where(top_p < 1, top_p * total, torch.inf).unsqueeze(1)
    kept = in_top_k & (reached - weights < needed)
    # Where top_k reaches further than the candidates do, the total is not known yet.
    covered = bounded | ((top_k >= vocab_size) & (reached[:, -1:] >= needed).squeeze(1))
    if 4 * num_candidates < vocab_size:
        noise = gumbel_noise_at(streams, positions, ids)
    else:
        noise = gumbel_noise(streams, positions, vocab_size).gather(1, ids)
    drawn = torch.where(kept, values + noise, -torch.inf)
    best = drawn.amax(dim=-1, keepdim=True)
    # Equal sums: the lowest id, as argmax over the vocabulary would. NaN is never kept, so something equals the best.
    return torch.where(drawn == best, ids, vocab_size).amin(dim=-1), covered


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    num_rows, vocab_size = logits.shape
    limit = _CPU_CHUNK * torch.get_num_threads() if logits.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, limit // vocab_size)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    for dtype, rows, vocab_size in ((torch.float32, 1, 7), (torch.float16, 3, 1537), (torch.bfloat16, 5, 130)):
        generator = torch.Generator().manual_seed(rows)
        yield ((torch.randn(rows, vocab_size, generator=generator) * 3).to(device, dtype),)


def _random_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for (logits,) in _cases(device):
        row = torch.arange(logits.shape[0], device=device)
        min_p = torch.where(row % 2 == 1, -2.0, -torch.inf)
        yield logits, 0.5 + 0.25 * row, None if len(row) == 1 else min_p, row * 0x1E3779B97F4A7C15, row * 3


def _filtered_cases(device: str) -> Iterator[tuple[Any, ...]]:
    """Rows whose top_k nothing bounds, then bounded ones."""
    for bounded in (False, True):
        for logits, temperature, log_min_p, streams, positions in _random_cases(device):
            row, vocab_size = torch.arange(logits.shape[0], device=device), logits.shape[1]
            top_p = 1 - 0.2 * (row % 3).to(torch.float64)
            top_k = row + 1 if bounded else torch.where(row % 2 == 0, vocab_size, 4)
            limit = len(row) if bounded else None
            yield logits, temperature, log_min_p, top_k, top_p, streams, positions, limit


def _nucleus_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for logits, temperature, log_min_p, streams, positions in _random_cases(device):
        top_p = 0.9 - 0.2 * (torch.arange(logits.shape[0], device=device) % 3).to(torch.float64)
        yield logits, temperature, log_min_p, top_p, streams, positions


greedy = Op(_greedy, cases=_cases, implementations={"triton": "shoal.kernels.triton.sample_rows:greedy"})
sample = Op(_sample, cases=_random_cases, implementations={"triton": "shoal.kernels.triton.sample_rows:sample"})
sample_filtered = Op(
    _sample_filtered,
    cases=_filtered_cases,
    implementations={"triton": "shoal.kernels.triton.sample_top_k:sample_filtered"},
)
sample_nucleus = Op(
    _sample_nucleus,
    cases=_nucleus_cases,
    implementations={"triton": "shoal.kernels.triton.sample_nucleus:sample_nucleus"},
)
