"""Paged attention of rows with any number of query tokens: prefill, chunks of it, and mixed batches.

A tile is BLOCK_Q query tokens of one row times the query heads of one KV head. Tiles are numbered from the last row's
last one on: a row's longest ones come first. Rows that begin in a pass have keys and values side by side; in large
passes these come by tensor descriptors, in a launch of its own: one kernel for both ways takes too many registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.triton.attention_tiles import load_blocks, token_offsets


@triton.jit
def _update(query, keys, values, visible, acc, best, total, scale_log2, PRECISION: tl.constexpr):
    """One tile of keys and values more; `visible` [queries, keys] where some do not see all."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if visible is not None:
        scores = tl.where(visible, scores, -1.0e30)
    new_best = tl.maximum(best, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_best[:, None])
    fade = tl.exp2(best - new_best)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_best, total


@triton.jit
def _accumulate(
    query, acc, best, total, first, last, q_pos, table, key_ptr, value_ptr, kv_base, scale_log2,
    block_stride, token_stride,
    BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys and values of the positions [first, last), from the cache."""
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
        visible = None
        if MASKED:
            visible = pos[None, :] <= q_pos[:, None]
        acc, best, total = _update(query, keys, values, visible, acc, best, total, scale_log2, PRECISION)
    return acc, best, total


@triton.jit
def _accumulate_own(
    query, acc, best, total, first, last, q_pos, q_len, token, key_desc, value_desc, kv_head, scale_log2,
    HEAD: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of a row that begins in this pass with its token number `token`."""
    offs = tl.arange(0, TILE)
    for start in range(first, last, TILE):
        keys = key_desc.load([token + start, kv_head, 0]).reshape(TILE, HEAD)
        values = value_desc.load([token + start, kv_head, 0]).reshape(TILE, HEAD)
        visible = None
        if MASKED:
            visible = (start + offs)[None, :] <= q_pos[:, None]
            # What the tile has of the next row gets no weight, and must not be NaN either.
            values = tl.where((start + offs < q_len)[:, None], values, 0.0)
        acc, best, total = _update(query, keys, values, visible, acc, best, total, scale_log2, PRECISION)
    return acc, best, total


@triton.jit
def _count_tiles(row, num_rows, starts_ptr, seq_lens_ptr, BLOCK_Q: tl.constexpr, WHICH: tl.constexpr):
    """Tiles of these rows' queries; 0 for rows that another kernel serves."""
    inside = (row >= 0) & (row < num_rows)
    start = tl.load(starts_ptr + row, mask=inside, other=0)
    q_len = tl.load(starts_ptr + row + 1, mask=inside, other=0) - start
    if WHICH != "all":
        q_len = tl.where(q_len == 1, 0, q_len)
    if WHICH == "fresh":
        q_len = tl.where(tl.load(seq_lens_ptr + row, mask=inside, other=0) == q_len, q_len, 0)
    if WHICH == "later":
        q_len = tl.where(tl.load(seq_lens_ptr + row, mask=inside, other=0) != q_len, q_len, 0)
    return tl.cdiv(q_len, BLOCK_Q)


@triton.jit
def _find_tile(
    turn, num_rows, starts_ptr, seq_lens_ptr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, WHICH: tl.constexpr
):
    """(row, its first token, its query tokens, those before this turn's tile, number of all tiles)."""
    rows = tl.arange(0, ROWS)
    passed = 0
    begin = 0
    num_tiles = 0
    for chunk in range(0, num_rows, ROWS):
        row = num_rows - 1 - chunk - rows
        tiles = _count_tiles(row, num_rows, starts_ptr, seq_lens_ptr, BLOCK_Q, WHICH)
        ends = num_tiles + tl.cumsum(tiles, 0)
        over = (ends <= turn) & (row >= 0)
        passed += tl.sum(over.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(over, ends, 0), 0))
        num_tiles += tl.sum(tiles, 0)
    row = tl.maximum(num_rows - 1 - passed, 0)
    start = tl.load(starts_ptr + row)
    q_len = tl.load(starts_ptr + row + 1) - start
    q_first = (tl.cdiv(q_len, BLOCK_Q) - 1 - (turn - begin)) * BLOCK_Q
    return row, start, q_len, q_first, num_tiles


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def prefill_kernel(
    query_ptr, key_ptr, value_ptr, key_desc, value_desc, starts_ptr, seq_lens_ptr, tables_ptr, out_ptr,
    scale_log2, num_rows, query_stride, query_head_stride, block_stride, token_stride, head_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr,
    WHICH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """WHICH rows: "all"; those of "many" query tokens; of these the "fresh", by descriptors, or the "later" ones."""
    kv_head = tl.program_id(0) % KV_HEADS
    lanes = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_PAD)
    turn = tl.program_id(0) // KV_HEADS
    row, start, q_len, q_first, num_tiles = _find_tile(
        turn, num_rows, starts_ptr, seq_lens_ptr, BLOCK_Q, ROWS, WHICH
    )  # fmt: skip
    while turn < num_tiles:
        q_index = q_first + lanes // GROUP
        lane_mask = (q_index < q_len) & (lanes < BLOCK_Q * GROUP)
        head = kv_head * GROUP + lanes % GROUP
        mask = lane_mask[:, None] & (dims < HEAD)[None, :]
        token = (start + q_index).to(tl.int64)
        q_at = (token * query_stride + head * query_head_stride)[:, None] + dims[None, :]
        query = tl.load(query_ptr + q_at, mask=mask, other=0.0)
        best = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
        # Tiles that every query of this tile sees whole need no mask.
        if WHICH == "fresh":
            whole = (q_first + 1) // TILE * TILE
            last = tl.minimum(q_first + BLOCK_Q, q_len)
            acc, best, total = _accumulate_own(
                query, acc, best, total, 0, whole, q_index, q_len, start, key_desc, value_desc, kv_head, scale_log2,
                HEAD, TILE, False, PRECISION,
            )  # fmt: skip
            acc, best, total = _accumulate_own(
                query, acc, best, total, whole, last, q_index, q_len, start, key_desc, value_desc, kv_head, scale_log2,
                HEAD, TILE, True, PRECISION,
            )  # fmt: skip
        else:
            seq_len = tl.load(seq_lens_ptr + row)
            context = seq_len - q_len
            table = tables_ptr + tl.cast(row, tl.int64) * table_stride
            kv_base = kv_head.to(tl.int64) * head_stride
            whole = (context + q_first + 1) // TILE * TILE
            last = tl.minimum(context + q_first + BLOCK_Q, seq_len)
            acc, best, total = _accumulate(
                query, acc, best, total, 0, whole, context + q_index, table, key_ptr, value_ptr, kv_base, scale_log2,
                block_stride, token_stride, BLOCK_SIZE, HEAD, HEAD_PAD, TILE, False, PRECISION,
            )  # fmt: skip
            acc, best, total = _accumulate(
                query, acc, best, total, whole, last, context + q_index, table, key_ptr, value_ptr, kv_base, scale_log2,
                block_stride, token_stride, BLOCK_SIZE, HEAD, HEAD_PAD, TILE, True, PRECISION,
            )  # fmt: skip
        at = ((token * (KV_HEADS * GROUP) + head) * HEAD)[:, None] + dims[None, :]
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)
        turn += tl.num_programs(0) // KV_HEADS
        if turn < num_tiles:
            row, start, q_len, q_first, num_tiles = _find_tile(
                turn, num_rows, starts_ptr, seq_lens_ptr, BLOCK_Q, ROWS, WHICH
            )  # fmt: skip
