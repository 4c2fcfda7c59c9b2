"""sample_rows in Triton: one pass over the logits in chunks, then the best of each row's chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_QUADS = 1024  # vocabulary ids a program looks at, in fours: one random block serves four ids


@triton.jit
def best_of_chunk_kernel(
    logits_ptr, temperature_ptr, streams_ptr, positions_ptr, value_ptr, index_ptr,
    vocab, logits_stride, num_chunks, QUADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    quads = chunk * QUADS + tl.arange(0, QUADS)
    temperature = tl.load(temperature_ptr + row)
    best = tl.full([QUADS], float("-inf"), tl.float32)
    index = tl.full([QUADS], 2147483647, tl.int32)
    base = logits_ptr + row * logits_stride
    if temperature > 0:
        stream = tl.load(streams_ptr + row).to(tl.uint64, bitcast=True)
        position = tl.load(positions_ptr + row).to(tl.uint32)
        zero = quads * 0
        c0 = quads.to(tl.uint32)
        c1 = zero.to(tl.uint32) + position
        w0, w1, w2, w3 = tl.philox(stream, c0, c1, zero.to(tl.uint32), zero.to(tl.uint32))
        for lane in tl.static_range(4):
            ids = quads * 4 + lane
            mask = ids < vocab
            logits = tl.load(base + ids, mask=mask, other=float("-inf")).to(tl.float32)
            if lane == 0:
                word = w0
            elif lane == 1:
                word = w1
            elif lane == 2:
                word = w2
            else:
                word = w3
            u = tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994)
            y = 1.0 - u
            # -log1p(-u), also where 1 - u rounds to 1
            whole = tl.where(y == 1.0, 1.0, y - 1.0)
            exponential = tl.where(y == 1.0, u, tl.log(y) * (u / whole))
            score = logits / temperature - tl.log(exponential)
            score = tl.where(mask, score, float("-inf"))
            better = (score > best) | ((score == best) & (ids < index))
            best = tl.where(better, score, best)
            index = tl.where(better, ids, index)
    else:
        for lane in tl.static_range(4):
            ids = quads * 4 + lane
            mask = ids < vocab
            score = tl.load(base + ids, mask=mask, other=float("-inf")).to(tl.float32)
            better = mask & ((score > best) | ((score == best) & (ids < index)))
            best = tl.where(better, score, best)
            index = tl.where(better, ids, index)
    top = tl.max(best, 0)
    tl.store(value_ptr + row * num_chunks + chunk, top)
    tl.store(index_ptr + row * num_chunks + chunk, tl.min(tl.where(best == top, index, 2147483647), 0))


@triton.jit
def best_chunk_kernel(value_ptr, index_ptr, out_ptr, vocab, num_chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, CHUNKS)
    mask = offs < num_chunks
    values = tl.load(value_ptr + row * num_chunks + offs, mask=mask, other=float("-inf"))
    index = tl.load(index_ptr + row * num_chunks + offs, mask=mask, other=2147483647)
    best = tl.min(tl.where(values == tl.max(values, 0), index, 2147483647), 0)
    tl.store(out_ptr + row, tl.minimum(best, vocab - 1).to(tl.int64))


def sample_rows(
    logits: torch.Tensor, temperature: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """See kernels/ops/sample_rows.py."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, 4 * _QUADS)
    values = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        best_of_chunk_kernel[(rows, chunks)](
            logits,
            temperature,
            streams,
            positions,
            values,
            index,
            vocab,
            logits.stride(0),
            chunks,
            QUADS=_QUADS,
            num_warps=4,
        )
        best_chunk_kernel[(rows,)](
            values, index, out, vocab, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1
        )
    return out
