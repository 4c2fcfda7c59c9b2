"""Paged attention of rows with any number of query tokens: prefill, chunks of it, and mixed batches."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _accumulate(
    query, acc, best, total, first, last, q_pos, table, key_ptr, value_ptr, kv_base, scale_log2,
    block_stride, token_stride, seq_len,
    BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_PAD)
    dim_mask = dims < HEAD
    for start in range(first, last, TILE):
        pos = start + offs
        valid = pos < seq_len
        block = tl.load(table + pos // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        at = block * block_stride + (pos % BLOCK_SIZE) * token_stride + kv_base
        keys = tl.load(key_ptr + at[None, :] + dims[:, None], mask=valid[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(query, keys, input_precision=PRECISION) * scale_log2
        if MASKED:
            scores = tl.where((pos[None, :] <= q_pos[:, None]) & valid[None, :], scores, -1.0e30)
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        values = tl.load(value_ptr + at[:, None] + dims[None, :], mask=valid[:, None] & dim_mask[None, :], other=0.0)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        best = new_best
    return acc, best, total


@triton.jit
def prefill_kernel(
    query_ptr, key_ptr, value_ptr, starts_ptr, seq_lens_ptr, tables_ptr, out_ptr,
    scale_log2, num_rows, num_tiles, block_stride, token_stride, head_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, KV_HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = num_tiles - 1 - tl.program_id(1)
    kv_head = tl.program_id(0)
    # Row r's tiles begin at starts[r] // BLOCK_Q + r: there are enough for any lengths, and a few stay empty.
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    row = low
    start = tl.load(starts_ptr + row)
    q_len = tl.load(starts_ptr + row + 1) - start
    q_first = (tile - start // BLOCK_Q - row) * BLOCK_Q
    if q_first >= q_len:
        return
    seq_len = tl.load(seq_lens_ptr + row)
    lanes = tl.arange(0, BLOCK_M)
    q_index = q_first + lanes // GROUP
    lane_mask = (q_index < q_len) & (lanes < BLOCK_Q * GROUP)
    head = kv_head * GROUP + lanes % GROUP
    dims = tl.arange(0, HEAD_PAD)
    mask = lane_mask[:, None] & (dims < HEAD)[None, :]
    at = ((start + q_index).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * HEAD + dims[None, :]
    query = tl.load(query_ptr + at, mask=mask, other=0.0)
    context = seq_len - q_len
    q_pos = context + q_index
    best = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    table = tables_ptr + tl.cast(row, tl.int64) * table_stride
    kv_base = kv_head.to(tl.int64) * head_stride
    whole = (context + q_first + 1) // TILE * TILE
    last = tl.minimum(context + q_first + BLOCK_Q, seq_len)
    acc, best, total = _accumulate(
        query, acc, best, total, 0, whole, q_pos, table, key_ptr, value_ptr, kv_base, scale_log2,
        block_stride, token_stride, seq_len, BLOCK_SIZE, HEAD, HEAD_PAD, TILE, False, PRECISION,
    )  # fmt: skip
    acc, best, total = _accumulate(
        query, acc, best, total, whole, last, q_pos, table, key_ptr, value_ptr, kv_base, scale_log2,
        block_stride, token_stride, seq_len, BLOCK_SIZE, HEAD, HEAD_PAD, TILE, True, PRECISION,
    )  # fmt: skip
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)
