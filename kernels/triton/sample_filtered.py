"""sample_filtered in Triton, without ordering the vocabulary.

top_k and min_p are found as selection.py says. top_p needs no threshold either: the kept ids are a beginning of the
order, so a draw from everything is the answer if what is ahead of it has less than top_p of the mass, and else a draw
from what is ahead of it is the next to be asked. With the noise that the reference uses, the first draw that passes is
the best of the kept ids. A draw passes as often as not even from a flat distribution, and nearly always at usual top_p.

Mass is counted in units of 2**-40 of the best id's, in integers: sums do not depend on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.noise import gumbel, words_of_block, words_of_ids
from shoal.kernels.triton.sample_rows import TILE, best_random
from shoal.kernels.triton.selection import CAPACITY, NO_ID, Selection, is_ahead, kth, load_scores, score_of, select

_INF = tl.constexpr(float("inf"))
_UNITS = tl.constexpr(1099511627776.0)
_CHUNK = 32 * TILE


@triton.jit
def _mass(scores, best):
    """In units; the best id's is 2**40."""
    return (tl.exp(scores - best) * _UNITS).to(tl.int64)


@triton.jit
def _mass_ahead(
    base, ids_ptr, length, temperature, floor, best, value, bound, ROW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of the ids ahead of (value, bound)."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < length
        scores, ids = load_scores(base, ids_ptr, offs, mask, temperature, floor, ROW)
        ahead = mask & is_ahead(scores, ids, value, bound)
        if tl.max(ahead.to(tl.int32), 0) != 0:
            total += tl.where(ahead, _mass(scores, best), 0)
    return tl.sum(total, 0)


@triton.jit
def _draw_ahead(
    base, ids_ptr, length, temperature, floor, stream, position, value, bound,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(id, score) of the best id, noise added, of those ahead of (value, bound); id NO_ID where there are none."""
    tops = tl.full([BLOCK], -_INF, tl.float32)
    top_scores = tl.full([BLOCK], -_INF, tl.float32)
    top_ids = tl.full([BLOCK], NO_ID, tl.int32)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < length
        scores, ids = load_scores(base, ids_ptr, offs, mask, temperature, floor, ROW)
        ahead = mask & is_ahead(scores, ids, value, bound)
        if tl.max(ahead.to(tl.int32), 0) != 0:
            if ROW:
                words = words_of_block(start, stream, position, BLOCK)
            else:
                words = words_of_ids(ids, stream, position)
            noisy = scores + gumbel(words)
            better = ahead & ((noisy > tops) | ((noisy == tops) & (ids < top_ids)))
            tops = tl.where(better, noisy, tops)
            top_scores = tl.where(better, scores, top_scores)
            top_ids = tl.where(better, ids, top_ids)
    index = tl.min(tl.where(tops == tl.max(tops, 0), top_ids, NO_ID), 0)
    return index, tl.max(tl.where(top_ids == index, top_scores, -_INF), 0)


@triton.jit
def _draw_of_limited(
    base, ids_ptr, length, temperature, floor, best, stream, position, k, top_p, vocab,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The answer of a row with a top_k or a floor, from the collected ids or, ROW, from all."""
    value, bound = kth(base, ids_ptr, length, temperature, floor, k, vocab, ROW, BLOCK)
    index, score = _draw_ahead(
        base, ids_ptr, length, temperature, floor, stream, position, value, bound, ROW, BLOCK
    )  # fmt: skip
    if top_p < 1:
        total = _mass_ahead(base, ids_ptr, length, temperature, floor, best, value, bound, ROW, BLOCK)
        index = _draw_of_nucleus(
            base, ids_ptr, length, temperature, floor, best, stream, position, index, score,
            total.to(tl.float64) * top_p, ROW, BLOCK,
        )  # fmt: skip
    return index


@triton.jit
def _draw_of_nucleus(
    base, ids_ptr, length, temperature, floor, best, stream, position, index, score, needed,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first draw, beginning with (index, score), that has less than `needed` mass ahead of it."""
    candidate = index
    while candidate != NO_ID:
        index = candidate
        mass = _mass_ahead(base, ids_ptr, length, temperature, floor, best, score, index, ROW, BLOCK)
        candidate = tl.full([], NO_ID, tl.int32)
        if mass.to(tl.float64) >= needed:
            candidate, score = _draw_ahead(
                base, ids_ptr, length, temperature, floor, stream, position, score, index, ROW, BLOCK
            )  # fmt: skip
    return index


@triton.jit
def draw_of_all_kernel(
    logits_ptr, temperature_ptr, streams_ptr, positions_ptr, top_k_ptr, best_ptr, bound_ptr,
    value_ptr, index_ptr, mass_ptr, vocab, logits_stride, chunk_size, num_chunks, TILE: tl.constexpr,
):  # fmt: skip
    """For rows with neither top_k nor floor: the best id, noise added, and the mass of each chunk, [n, num_chunks]."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if (tl.load(top_k_ptr + row) >= vocab) & (tl.load(bound_ptr + row) == -_INF):
        base = logits_ptr + row * logits_stride
        first = chunk * chunk_size
        end = tl.minimum(first + chunk_size, vocab)
        temperature = tl.load(temperature_ptr + row)
        stream = tl.load(streams_ptr + row).to(tl.uint64, bitcast=True)
        position = tl.load(positions_ptr + row)
        value, index = best_random(base, first, end, vocab, temperature, -_INF, stream, position, False, TILE)
        best = tl.load(best_ptr + row)
        total = tl.zeros([TILE], tl.int64)
        for start in range(first, end, TILE):
            offs = start + tl.arange(0, TILE)
            logits = tl.load(base + offs, mask=offs < end, other=-_INF)
            total += _mass(score_of(logits, temperature, -_INF), best)
        at = row * num_chunks + chunk
        tl.store(value_ptr + at, value)
        tl.store(index_ptr + at, index)
        tl.store(mass_ptr + at, tl.sum(total, 0))


@triton.jit
def sample_filtered_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, streams_ptr, positions_ptr,
    best_ptr, floor_ptr, bound_ptr, count_ptr, scores_ptr, ids_ptr, value_ptr, index_ptr, mass_ptr, out_ptr,
    vocab, logits_stride, num_chunks,
    CHUNKS: tl.constexpr, CAPACITY: tl.constexpr, SMALL: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """One program a row: -> out [n]."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    stream = tl.load(streams_ptr + row).to(tl.uint64, bitcast=True)
    position = tl.load(positions_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    k = tl.load(top_k_ptr + row).to(tl.int32)
    best = tl.load(best_ptr + row)
    floor = tl.load(floor_ptr + row)
    bound = tl.load(bound_ptr + row)
    count = tl.load(count_ptr + row)
    index = tl.full([], 0, tl.int32)
    if (bound > -_INF) & (count <= CAPACITY):
        index = _draw_of_limited(
            scores_ptr + row * CAPACITY, ids_ptr + row * CAPACITY, count, temperature, floor, best, stream, position,
            k, top_p, vocab, False, SMALL,
        )  # fmt: skip
    else:
        if (bound > -_INF) | (k < vocab):
            index = _draw_of_limited(
                base, base, vocab, temperature, floor, best, stream, position, k, top_p, vocab, True, LARGE
            )  # fmt: skip
        elif value_ptr is not None:
            chunks = tl.arange(0, CHUNKS)
            mask = chunks < num_chunks
            at = row * num_chunks + chunks
            values = tl.load(value_ptr + at, mask=mask, other=-_INF)
            indices = tl.load(index_ptr + at, mask=mask, other=NO_ID)
            total = tl.sum(tl.load(mass_ptr + at, mask=mask, other=0), 0)
            index = tl.min(tl.where(values == tl.max(values, 0), indices, NO_ID), 0)
            if top_p < 1:
                score = score_of(tl.load(base + index), temperature, floor)
                index = _draw_of_nucleus(
                    base, base, vocab, temperature, floor, best, stream, position, index, score,
                    total.to(tl.float64) * top_p, True, LARGE,
                )  # fmt: skip
    # Where nothing is left at all (NaN, or a floor above everything), the lowest id, as everywhere.
    tl.store(out_ptr + row, tl.where(index == NO_ID, 0, index).to(tl.int64))


def sample_filtered(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    log_min_p: torch.Tensor | None,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    max_top_k: int | None = None,
) -> torch.Tensor:
    """See kernels/ops/sampling.py."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    found = select(logits, temperature, log_min_p, top_k)
    chunks = triton.cdiv(vocab, _CHUNK)
    value = index = mass = None
    if max_top_k is None or max_top_k >= vocab:  # some rows may have neither top_k nor min_p
        value, index, mass = _draw_of_all(logits, temperature, top_k, streams, positions, found, chunks)
    sample_filtered_kernel[(rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        streams,
        positions,
        found.best,
        found.floor,
        found.bound,
        found.count,
        found.scores,
        found.ids,
        value,
        index,
        mass,
        out,
        vocab,
        logits.stride(0),
        chunks,
        CHUNKS=triton.next_power_of_2(chunks),
        CAPACITY=CAPACITY,
        SMALL=1024,
        LARGE=4096,
        num_warps=8,
    )
    return out


def _draw_of_all(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    found: Selection,
    chunks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, vocab = logits.shape
    value, index, mass = (
        torch.empty((rows, chunks), dtype=dtype, device=logits.device)
        for dtype in (torch.float32, torch.int32, torch.int64)
    )
    draw_of_all_kernel[(rows, chunks)](
        logits,
        temperature,
        streams,
        positions,
        top_k,
        found.best,
        found.bound,
        value,
        index,
        mass,
        vocab,
        logits.stride(0),
        _CHUNK,
        chunks,
        TILE=TILE,
        num_warps=1,
    )
    return value, index, mass
