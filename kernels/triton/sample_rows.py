"""sample_rows, sample and greedy in Triton: one pass over the logits in chunks, then the best of each row's chunks.

Noise for every id would be bound by arithmetic: Philox once for four ids, but a division and two logarithms for each.
So a program keeps the best score it has seen and asks of each id, by one exp2, whether its noise could lift it above
that; scores are computed for the few ids that pass. With u the uniform variate of philox.py, the noise is -log(E) with
E >= u, so an id can only win where u <= exp(logit / temperature - best). The test errs on the side of passing, and what
it passes is judged by its score alone: chunks and tiles decide how long a choice takes, never what it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.dependent import launch_options, wait_for_previous
from shoal.kernels.triton.noise import gumbel, words_of_block, words_of_ids

TILE = 256  # ids of one warp's step: 16 bytes of bfloat16 a thread
_START = tl.constexpr(32)  # ids scored at first, so that there is something to beat
_LOG2E = tl.constexpr(1.4426950408889634)
_NO_ID = tl.constexpr(2147483647)


@triton.jit
def _scores(base, ids, mask, stream, position, temperature, floor):
    """logits / temperature + noise at these ids, as exact as the reference; -inf below the floor."""
    logits = tl.load(base + ids, mask=mask, other=float("-inf")).to(tl.float32)
    scaled = tl.div_rn(logits, temperature)
    return tl.where(scaled >= floor, scaled + gumbel(words_of_ids(ids, stream, position)), float("-inf"))


@triton.jit
def _margin(logits, low, factor, best):
    """Below 0 where 1 + u, of which `low` is a lower bound, exceeds 1 + exp(logit / temperature - best)."""
    slack = 0.001 + tl.abs(best) * 2e-6  # exp2's error and what scaling large logits rounds away
    return tl.exp2(logits * factor - (best * _LOG2E - slack)) + 1.0000003 - low


@triton.jit
def best_random(base, first, end, vocab, temperature, floor, stream, position, FLOOR: tl.constexpr, TILE: tl.constexpr):
    """(score, id) of the best id in [first, end)."""
    some = first + tl.arange(0, _START)
    scores = _scores(base, some, some < vocab, stream, position, temperature, floor)
    best = tl.max(scores, 0)
    index = tl.min(tl.where(scores == best, some, _NO_ID), 0)
    factor = _LOG2E / temperature
    for start in range(first, end, TILE):
        ids = start + tl.arange(0, TILE)
        logits = tl.load(base + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        if FLOOR:
            low_floor = floor * temperature - tl.abs(floor * temperature) * 1e-6
            logits = tl.where(logits >= low_floor, logits, float("-inf"))
        words = words_of_block(start, stream, position, TILE)
        low = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + u, cut to 23 bits
        margin = _margin(logits, low, factor, best)
        # Of integers the warp finds the largest in one instruction, and the sign bit says all.
        if tl.max(margin.to(tl.int32, bitcast=True), 0) >= 0:
            hits = margin >= 0
            while tl.max(hits.to(tl.int32), 0) != 0:
                top = tl.max(tl.where(hits, logits, float("-inf")), 0)
                chosen = tl.min(tl.where(hits & (logits == top), ids, _NO_ID), 0)
                score = _scores(base, chosen, chosen < vocab, stream, position, temperature, floor)
                if (score > best) | ((score == best) & (chosen < index)):
                    best = score
                    index = chosen
                hits = hits & (ids != chosen) & (_margin(logits, low, factor, best) >= 0)
    return best, index


@triton.jit
def _best_greedy(base, first, end, vocab, TILE: tl.constexpr):
    """(logit, id) of the best id in [first, end)."""
    best = float("-inf")
    index = first
    for start in range(first, end, TILE):
        ids = start + tl.arange(0, TILE)
        logits = tl.load(base + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        top = tl.max(logits, 0)
        if top > best:
            best = top
            index = tl.min(tl.where(logits == top, ids, _NO_ID), 0)
    return best, index


@triton.jit
def best_of_chunk_kernel(
    logits_ptr, temperature_ptr, floor_ptr, streams_ptr, positions_ptr, value_ptr, index_ptr,
    vocab, logits_stride, chunk_size, num_chunks, TILE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """logits [n, vocab] -> the best score and its id of each chunk, [n, num_chunks]; no temperatures: all greedy."""
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    base = logits_ptr + row * logits_stride
    first = chunk * chunk_size
    end = tl.minimum(first + chunk_size, vocab)
    if temperature_ptr is None:
        best, index = _best_greedy(base, first, end, vocab, TILE)
    else:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        if temperature > 0:
            floor = float("-inf")
            if floor_ptr is not None:
                floor = tl.load(floor_ptr + row)
            stream = tl.load(streams_ptr + row).to(tl.uint64, bitcast=True)
            position = tl.load(positions_ptr + row)
            FLOOR: tl.constexpr = floor_ptr is not None
            best, index = best_random(base, first, end, vocab, temperature, floor, stream, position, FLOOR, TILE)
        else:
            best, index = _best_greedy(base, first, end, vocab, TILE)
    tl.store(value_ptr + row * num_chunks + chunk, best)
    tl.store(index_ptr + row * num_chunks + chunk, index)


@triton.jit
def best_chunk_kernel(value_ptr, index_ptr, out_ptr, num_chunks, CHUNKS: tl.constexpr, DEPENDENT: tl.constexpr):
    """[n, num_chunks] -> the id of each row's best score, the lowest among equals."""
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, CHUNKS)
    mask = offs < num_chunks
    values = tl.load(value_ptr + row * num_chunks + offs, mask=mask, other=float("-inf"))
    index = tl.load(index_ptr + row * num_chunks + offs, mask=mask, other=_NO_ID)
    best = tl.min(tl.where(values == tl.max(values, 0), index, _NO_ID), 0)
    tl.store(out_ptr + row, best.to(tl.int64))


def _choose(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    floor: torch.Tensor | None,
    streams: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    # Long chunks, whose best score rules out more, where rows alone fill the device.
    tiles = 32 if rows > 128 else 16 if rows > 64 else 8 if rows > 16 else 2
    chunk_size = TILE * tiles
    chunks = triton.cdiv(vocab, chunk_size)
    values = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    best_of_chunk_kernel[(rows, chunks)](
        logits,
        temperature,
        floor,
        streams,
        positions,
        values,
        index,
        vocab,
        logits.stride(0),
        chunk_size,
        chunks,
        TILE=TILE,
        num_warps=1,  # a vote of one warp needs no barrier
        **launch_options(logits.device),
    )
    best_chunk_kernel[(rows,)](
        values,
        index,
        out,
        chunks,
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=1,
        **launch_options(logits.device),
    )
    return out


def sample_rows(
    logits: torch.Tensor, temperature: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """See kernels/ops/sample_rows.py."""
    return _choose(logits, temperature, None, streams, positions)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See kernels/ops/sampling.py."""
    return _choose(logits, None, None, None, None)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    log_min_p: torch.Tensor | None,
    streams: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """See kernels/ops/sampling.py."""
    floor = None
    if log_min_p is not None:
        floor = logits.amax(dim=-1).float() / temperature + log_min_p
    return _choose(logits, temperature, floor, streams, positions)
