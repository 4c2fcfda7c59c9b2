"""Paged attention of rows with any number of query tokens: prefill, chunks of it, and mixed batches.

A tile is BLOCK_Q query tokens of one row times the query heads of one KV head. Tiles are numbered through all rows and
taken from the back, where a row's longest ones are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.triton.attention_tiles import load_blocks, token_offsets


@triton.jit
def _accumulate(
    query, acc, best, total, first, last, q_pos, table, key_ptr, value_ptr, kv_base, scale_log2,
    block_stride, token_stride,
    BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_PAD)
    # Block ids are loaded a tile ahead: the loads of keys and values then wait for nothing.
    block = load_blocks(table, first, last, BLOCK_SIZE, TILE)
    for start in range(first, last, TILE):
        pos = start + offs
        at = token_offsets(block, start, block_stride, token_stride, BLOCK_SIZE, TILE) + kv_base
        at = at[:, None] + dims[None, :]
        block = load_blocks(table, start + TILE, last, BLOCK_SIZE, TILE)
        if MASKED or HEAD != HEAD_PAD:
            mask = (pos < last)[:, None] & (dims < HEAD)[None, :]
            keys = tl.load(key_ptr + at, mask=mask, other=0.0)
            values = tl.load(value_ptr + at, mask=mask, other=0.0)
        else:
            keys = tl.load(key_ptr + at)
            values = tl.load(value_ptr + at)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(pos[None, :] <= q_pos[:, None], scores, -1.0e30)
        new_best = tl.maximum(best, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        best = new_best
    return acc, best, total


@triton.jit
def _count_tiles(row, num_rows, starts_ptr, BLOCK_Q: tl.constexpr, SKIP_ONE: tl.constexpr):
    """Tiles of these rows' queries; 0 for rows of one query token where another kernel serves them."""
    inside = row < num_rows
    start = tl.load(starts_ptr + row, mask=inside, other=0)
    q_len = tl.load(starts_ptr + row + 1, mask=inside, other=0) - start
    if SKIP_ONE:
        q_len = tl.where(q_len == 1, 0, q_len)
    return tl.cdiv(q_len, BLOCK_Q)


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def prefill_kernel(
    query_ptr, key_ptr, value_ptr, starts_ptr, seq_lens_ptr, tables_ptr, out_ptr,
    scale_log2, num_rows, query_stride, query_head_stride, block_stride, token_stride, head_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr,
    SKIP_ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % KV_HEADS
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_PAD)
    num_tiles = 0
    for chunk in range(0, num_rows, ROWS):
        num_tiles += tl.sum(_count_tiles(chunk + rows, num_rows, starts_ptr, BLOCK_Q, SKIP_ONE), 0)
    for turn in range(tl.program_id(0) // KV_HEADS, num_tiles, tl.num_programs(0) // KV_HEADS):
        tile = num_tiles - 1 - turn
        row = 0
        row_begin = 0
        before = 0
        for chunk in range(0, num_rows, ROWS):
            tiles = _count_tiles(chunk + rows, num_rows, starts_ptr, BLOCK_Q, SKIP_ONE)
            ends = before + tl.cumsum(tiles, 0)
            passed = (ends <= tile) & (chunk + rows < num_rows)
            row += tl.sum(passed.to(tl.int32), 0)
            row_begin = tl.maximum(row_begin, tl.max(tl.where(passed, ends, 0), 0))
            before += tl.sum(tiles, 0)
        start = tl.load(starts_ptr + row)
        q_len = tl.load(starts_ptr + row + 1) - start
        seq_len = tl.load(seq_lens_ptr + row)
        q_first = (tile - row_begin) * BLOCK_Q
        q_index = q_first + lanes // GROUP
        lane_mask = (q_index < q_len) & (lanes < BLOCK_Q * GROUP)
        head = kv_head * GROUP + lanes % GROUP
        mask = lane_mask[:, None] & (dims < HEAD)[None, :]
        token = (start + q_index).to(tl.int64)
        q_at = (token * query_stride + head * query_head_stride)[:, None] + dims[None, :]
        query = tl.load(query_ptr + q_at, mask=mask, other=0.0)
        context = seq_len - q_len
        q_pos = context + q_index
        best = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
        table = tables_ptr + tl.cast(row, tl.int64) * table_stride
        kv_base = kv_head.to(tl.int64) * head_stride
        # Tiles that every query of this tile sees whole need no mask.
        whole = (context + q_first + 1) // TILE * TILE
        last = tl.minimum(context + q_first + BLOCK_Q, seq_len)
        acc, best, total = _accumulate(
            query, acc, best, total, 0, whole, q_pos, table, key_ptr, value_ptr, kv_base, scale_log2,
            block_stride, token_stride, BLOCK_SIZE, HEAD, HEAD_PAD, TILE, False, PRECISION,
        )  # fmt: skip
        acc, best, total = _accumulate(
            query, acc, best, total, whole, last, q_pos, table, key_ptr, value_ptr, kv_base, scale_log2,
            block_stride, token_stride, BLOCK_SIZE, HEAD, HEAD_PAD, TILE, True, PRECISION,
        )  # fmt: skip
        at = ((token * (KV_HEADS * GROUP) + head) * HEAD)[:, None] + dims[None, :]
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)
