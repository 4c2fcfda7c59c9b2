"""logprobs_of in Triton: each chunk's maximum, sum of exponentials and rank share, then the rows' answers from those.

The logits are read once, in their own dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 4096
_IDS = 256


@triton.jit
def chunk_statistics_kernel(
    logits_ptr, ids_ptr, best_ptr, sum_ptr, count_ptr, vocab, logits_stride, ids_stride, num_chunks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """logits [n, vocab] -> [n, num_chunks] each: maximum, sum of exp(logit - maximum), logits >= that of ids[:, 0]."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    base = logits_ptr + row * logits_stride
    target = tl.load(base + tl.load(ids_ptr + row * ids_stride)).to(tl.float32)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = offs < vocab
    logits = tl.load(base + offs, mask=mask, other=float("-inf")).to(tl.float32)
    best = tl.max(logits, 0)
    # A chunk of -inf alone adds nothing, and exp(-inf - -inf) must not make it NaN.
    total = tl.sum(tl.exp(logits - tl.where(best == float("-inf"), 0.0, best)), 0)
    at = row * num_chunks + chunk
    tl.store(best_ptr + at, best)
    tl.store(sum_ptr + at, total)
    tl.store(count_ptr + at, tl.sum((mask & (logits >= target)).to(tl.int32), 0))


@triton.jit
def logprobs_kernel(
    logits_ptr, ids_ptr, best_ptr, sum_ptr, count_ptr, out_ptr, ranks_ptr,
    num_ids, logits_stride, ids_stride, num_chunks, CHUNKS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """ids [n, num_ids] -> out [n, num_ids]; ranks [n]."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    mask = chunks < num_chunks
    at = row * num_chunks + chunks
    parts = tl.load(best_ptr + at, mask=mask, other=float("-inf"))
    best = tl.max(parts, 0)
    log_sum = tl.log(tl.sum(tl.load(sum_ptr + at, mask=mask, other=0.0) * tl.exp(parts - best), 0))
    offs = tl.program_id(1) * IDS + tl.arange(0, IDS)
    wanted = offs < num_ids
    ids = tl.load(ids_ptr + row * ids_stride + offs, mask=wanted, other=0)
    logits = tl.load(logits_ptr + row * logits_stride + ids, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_ids + offs, logits - best - log_sum, mask=wanted)
    if tl.program_id(1) == 0:
        tl.store(ranks_ptr + row, tl.sum(tl.load(count_ptr + at, mask=mask, other=0), 0))


def logprobs_of(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels/ops/logprobs_of.py."""
    rows, vocab = logits.shape
    width = ids.shape[1]
    assert logits.stride(1) == 1
    assert width == 1 or ids.stride(1) == 1
    out = torch.empty((rows, width), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return out, ranks
    chunks = triton.cdiv(vocab, _CHUNK)
    best, total = torch.empty((2, rows, chunks), dtype=torch.float32, device=logits.device)
    count = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    chunk_statistics_kernel[(rows, chunks)](
        logits,
        ids,
        best,
        total,
        count,
        vocab,
        logits.stride(0),
        ids.stride(0),
        chunks,
        CHUNK=_CHUNK,
        num_warps=8,
    )
    logprobs_kernel[(rows, triton.cdiv(width, _IDS))](
        logits,
        ids,
        best,
        total,
        count,
        out,
        ranks,
        width,
        logits.stride(0),
        ids.stride(0),
        chunks,
        CHUNKS=triton.next_power_of_2(chunks),
        IDS=_IDS,
        num_warps=4,
    )
    return out, ranks
