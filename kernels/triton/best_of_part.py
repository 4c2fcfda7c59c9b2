"""best_of_part in Triton: the passes of sample_rows.py over ids that do not begin at 0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.sample_rows import TILE, _best_greedy, best_random

_NONE = tl.constexpr(-0x7FFFFFFFFFFFFFFF - 1)


@triton.jit
def best_of_part_kernel(
    logits_ptr, temperature_ptr, streams_ptr, positions_ptr, packed_ptr,
    first_id, end_id, logits_stride, chunk_size, num_chunks, TILE: tl.constexpr,
):  # fmt: skip
    """logits [n, ids from first_id on] -> the packed best of each chunk, int64 [n, num_chunks]."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    base = logits_ptr + row * logits_stride - first_id
    first = first_id + chunk * chunk_size
    end = tl.minimum(first + chunk_size, end_id)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature > 0:
        stream = tl.load(streams_ptr + row).to(tl.uint64, bitcast=True)
        position = tl.load(positions_ptr + row)
        floor = float("-inf")
        best, index = best_random(base, first, end, end_id, temperature, floor, stream, position, False, TILE)
    else:
        best, index = _best_greedy(base, first, end, end_id, TILE)
    bits = (best + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    tl.store(packed_ptr + row * num_chunks + chunk, (ordered << 32) | (4294967295 - index.to(tl.int64)))


@triton.jit
def largest_kernel(packed_ptr, out_ptr, num_chunks, CHUNKS: tl.constexpr):
    """int64 [n, num_chunks] -> the largest of each row."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, CHUNKS)
    packed = tl.load(packed_ptr + row * num_chunks + offs, mask=offs < num_chunks, other=_NONE)
    tl.store(out_ptr + row, tl.max(packed, 0))


def best_of_part(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    first_id: int,
    num_ids: int,
) -> torch.Tensor:
    """See kernels/ops/best_of_part.py."""
    rows = logits.shape[0]
    assert logits.stride(1) == 1
    assert first_id % 4 == 0
    if num_ids <= 0 or not rows:
        return torch.full((rows,), torch.iinfo(torch.int64).min, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    # Long chunks, whose best score rules out more, where rows alone fill the device.
    tiles = 32 if rows > 128 else 16 if rows > 64 else 8 if rows > 16 else 2
    chunks = triton.cdiv(num_ids, TILE * tiles)
    packed = torch.empty((rows, chunks), dtype=torch.int64, device=logits.device)
    best_of_part_kernel[(rows, chunks)](
        logits,
        temperature,
        streams,
        positions,
        packed,
        first_id,
        first_id + num_ids,
        logits.stride(0),
        TILE * tiles,
        chunks,
        TILE=TILE,
        num_warps=1,  # a vote of one warp needs no barrier
    )
    largest_kernel[(rows,)](packed, out, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1)
    return out
