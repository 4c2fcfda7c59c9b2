"""sample_nucleus in Triton: top_p without ordering the vocabulary.

The kept ids are those above a place in the order of scores (the lower id first among equals): the ids that have less
than `needed`, top_p of all mass, ahead of them. That place is found as radix sorts do it, 11, 11 and 10 bits of the
float at a time: each level adds the mass of every id that agrees with the bits found so far to one of 2,048 buckets,
and a running sum says in which bucket `needed` is reached. After three levels the score is known, and how much mass is
ahead of the ids that have it; of these the lowest ids are kept, as many as still fit.

Mass is counted in units of 2**-40 of the best id's, in integers: sums do not depend on their order, which atomics do
not keep. All programs but those of `cut` take a piece of a row. Nothing is asked by the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.noise import gumbel, words_of_ids
from shoal.kernels.triton.sample_rows import best_chunk_kernel
from shoal.kernels.triton.selection import NO_ID, mass_of, score_of

_INF = tl.constexpr(float("inf"))
_BUCKETS = 2048
_LEVELS = ((21, 11), (10, 11), (0, 10))  # shift and width of the bits of each
_TILE, _CHUNK = 1024, 8192


@triton.jit
def _places(scores):
    """Integers of 32 bits, ascending from the best score on; equal for equal scores."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 and 0.0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return 2147483647 - ordered.to(tl.int64)


@triton.jit
def _best_of_row(maxima_ptr, row, num_chunks, temperature, CHUNKS: tl.constexpr):
    chunks = tl.arange(0, CHUNKS)
    maxima = tl.load(maxima_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=-_INF)
    return tl.div_rn(tl.max(maxima, 0), temperature)


@triton.jit
def maxima_kernel(logits_ptr, maxima_ptr, vocab, logits_stride, num_chunks, CHUNK: tl.constexpr):
    """logits [n, vocab] -> the largest of each chunk, float32 [n, num_chunks]; NaN counts as -inf."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * logits_stride + offs, mask=offs < vocab, other=-_INF).to(tl.float32)
    logits = tl.where(logits == logits, logits, -_INF)
    tl.store(maxima_ptr + row * num_chunks + tl.program_id(1), tl.max(logits, 0))


@triton.jit
def buckets_kernel(
    logits_ptr, temperature_ptr, log_min_p_ptr, maxima_ptr, prefix_ptr, sums_ptr, vocab, logits_stride, num_chunks,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, BUCKETS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds the mass of ids whose place begins with the row's prefix to sums int64 [n, BUCKETS], by the next bits."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    best = _best_of_row(maxima_ptr, row, num_chunks, temperature, CHUNKS)
    floor = -_INF
    if log_min_p_ptr is not None:
        floor = best + tl.load(log_min_p_ptr + row)
    prefix = tl.load(prefix_ptr + row)
    first = tl.program_id(1) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, vocab), TILE):
        offs = start + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + row * logits_stride + offs, mask=offs < vocab, other=-_INF)
        scores = score_of(logits, temperature, floor)
        places = _places(scores)
        mass = mass_of(scores, best)
        counted = (mass > 0) & ((places >> (SHIFT + WIDTH)) == prefix)
        bucket = (places >> SHIFT) & ((1 << WIDTH) - 1)
        tl.atomic_add(sums_ptr + row * BUCKETS + bucket, mass, mask=counted, sem="relaxed")


@triton.jit
def cut_kernel(
    sums_ptr, top_p_ptr, prefix_ptr, before_ptr, needed_ptr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """One program a row: the bucket in which `needed` is reached goes to the prefix, the mass ahead of it to before."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BUCKETS)
    sums = tl.load(sums_ptr + row * BUCKETS + offs)
    if FIRST:
        needed = tl.load(top_p_ptr + row) * tl.sum(sums, 0).to(tl.float64)
        tl.store(needed_ptr + row, needed)
    else:
        needed = tl.load(needed_ptr + row)
    before = tl.load(before_ptr + row)
    reached = (before + tl.cumsum(sums, 0)).to(tl.float64) >= needed
    found = tl.min(tl.where(reached, offs, BUCKETS - 1), 0)
    tl.store(before_ptr + row, before + tl.sum(tl.where(offs < found, sums, 0), 0))
    tl.store(prefix_ptr + row, (tl.load(prefix_ptr + row) << WIDTH) + found)


@triton.jit
def equals_kernel(
    logits_ptr, temperature_ptr, prefix_ptr, equals_ptr, vocab, logits_stride, num_chunks,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many ids of each chunk have the score where the row is cut: int32 [n, num_chunks]."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    cut = tl.load(prefix_ptr + row)
    first = tl.program_id(1) * CHUNK
    counts = tl.zeros([TILE], tl.int32)
    for start in range(first, tl.minimum(first + CHUNK, vocab), TILE):
        offs = start + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + row * logits_stride + offs, mask=offs < vocab, other=-_INF)
        places = _places(score_of(logits, temperature, -_INF))
        counts += ((offs < vocab) & (places == cut)).to(tl.int32)
    tl.store(equals_ptr + row * num_chunks + tl.program_id(1), tl.sum(counts, 0))


@triton.jit
def draw_kernel(
    logits_ptr, temperature_ptr, streams_ptr, positions_ptr, maxima_ptr,
    prefix_ptr, before_ptr, needed_ptr, equals_ptr, value_ptr, index_ptr, vocab, logits_stride, num_chunks,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The best kept id of each chunk, noise added: its score and itself, [n, num_chunks]."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    best = _best_of_row(maxima_ptr, row, num_chunks, temperature, CHUNKS)
    stream = tl.load(streams_ptr + row).to(tl.uint64, bitcast=True)
    position = tl.load(positions_ptr + row)
    cut, before, needed = tl.load(prefix_ptr + row), tl.load(before_ptr + row), tl.load(needed_ptr + row)
    chunks = tl.arange(0, CHUNKS)
    equals = tl.load(equals_ptr + row * num_chunks + chunks, mask=chunks < chunk, other=0)
    rank = tl.sum(equals, 0)  # of the next id with the score of the cut, among all with it
    tops = tl.full([TILE], -_INF, tl.float32)
    top_ids = tl.full([TILE], NO_ID, tl.int32)
    first = chunk * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, vocab), TILE):
        offs = start + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + row * logits_stride + offs, mask=offs < vocab, other=-_INF)
        scores = score_of(logits, temperature, -_INF)
        places = _places(scores)
        mass = mass_of(scores, best)
        equal = ((offs < vocab) & (places == cut)).to(tl.int32)
        ranks = (rank + tl.cumsum(equal, 0) - equal).to(tl.int64)
        fits = (before + ranks * mass).to(tl.float64) < needed
        kept = (offs < vocab) & (mass > 0) & ((places < cut) | ((equal == 1) & fits))
        rank += tl.sum(equal, 0)
        if tl.max(kept.to(tl.int32), 0) != 0:
            noisy = scores + gumbel(words_of_ids(offs, stream, position))
            better = kept & (noisy > tops)  # ids ascend: the first of equals stays
            tops = tl.where(better, noisy, tops)
            top_ids = tl.where(better, offs, top_ids)
    top = tl.max(tops, 0)
    index = tl.min(tl.where(tops == top, top_ids, NO_ID), 0)
    at = row * num_chunks + chunk
    tl.store(value_ptr + at, top)
    tl.store(index_ptr + at, tl.where(index == NO_ID, first, index))  # where no chunk has any: the lowest id of all


def sample_nucleus(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    log_min_p: torch.Tensor | None,
    top_p: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """See kernels/ops/sampling.py."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    device, stride = logits.device, logits.stride(0)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    temperature, top_p = temperature.contiguous(), top_p.contiguous()  # may be columns of a table
    streams, positions = streams.contiguous(), positions.contiguous()
    log_min_p = None if log_min_p is None else log_min_p.contiguous()
    chunks = triton.cdiv(vocab, _CHUNK)
    grid, padded = (rows, chunks), triton.next_power_of_2(chunks)
    maxima, value = (torch.empty(grid, dtype=torch.float32, device=device) for _ in range(2))
    equals, index = (torch.empty(grid, dtype=torch.int32, device=device) for _ in range(2))
    prefix, before = torch.zeros((2, rows), dtype=torch.int64, device=device)
    needed = torch.empty(rows, dtype=torch.float64, device=device)
    sums = torch.zeros((len(_LEVELS), rows, _BUCKETS), dtype=torch.int64, device=device)
    maxima_kernel[grid](logits, maxima, vocab, stride, chunks, CHUNK=_CHUNK, num_warps=8)
    for level, (shift, width) in enumerate(_LEVELS):
        buckets_kernel[grid](
            logits, temperature, log_min_p, maxima, prefix, sums[level], vocab, stride, chunks,
            SHIFT=shift, WIDTH=width, BUCKETS=_BUCKETS, CHUNKS=padded, CHUNK=_CHUNK, TILE=_TILE, num_warps=4,
        )  # fmt: skip
        cut_kernel[(rows,)](
            sums[level], top_p, prefix, before, needed, FIRST=level == 0, WIDTH=width, BUCKETS=_BUCKETS, num_warps=4
        )
    equals_kernel[grid](
        logits, temperature, prefix, equals, vocab, stride, chunks, CHUNK=_CHUNK, TILE=_TILE, num_warps=4
    )
    draw_kernel[grid](
        logits, temperature, streams, positions, maxima, prefix, before, needed, equals, value, index,
        vocab, stride, chunks, CHUNKS=padded, CHUNK=_CHUNK, TILE=_TILE, num_warps=4,
    )  # fmt: skip
    best_chunk_kernel[(rows,)](value, index, out, chunks, CHUNKS=padded, DEPENDENT=False, num_warps=1)
    return out
