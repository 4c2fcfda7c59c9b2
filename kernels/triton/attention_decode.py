"""Paged attention of rows with one query token each (decode)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    query_ptr, key_ptr, value_ptr, seq_lens_ptr, tables_ptr, out_ptr, partial_ptr, lse_ptr,
    scale_log2, query_stride, block_stride, token_stride, head_stride, table_stride, num_splits,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, KV_HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    row = (pid // KV_HEADS).to(tl.int64)
    split = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + row)
    heads = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, HEAD_PAD)
    head_mask = heads < GROUP
    dim_mask = dims < HEAD
    q_mask = head_mask[:, None] & dim_mask[None, :]
    q_at = row * query_stride + (kv_head * GROUP + heads)[:, None] * HEAD + dims[None, :]
    if SPLIT:
        tiles = tl.cdiv(seq_len, TILE)
        share = tl.cdiv(tiles, num_splits) * TILE
        start = split * share
        end = tl.minimum(start + share, seq_len)
    else:
        start = 0
        end = seq_len
    query = tl.load(query_ptr + q_at, mask=q_mask, other=0.0)
    best = tl.full([GROUP_PAD], -1.0e30, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    offs = tl.arange(0, TILE)
    table = tables_ptr + row * table_stride
    kv_base = kv_head.to(tl.int64) * head_stride
    for first in range(start, end, TILE):
        pos = first + offs
        valid = pos < end
        block = tl.load(table + pos // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        at = block * block_stride + (pos % BLOCK_SIZE) * token_stride + kv_base
        keys = tl.load(key_ptr + at[None, :] + dims[:, None], mask=valid[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(query, keys, input_precision=PRECISION) * scale_log2
        scores = tl.where(valid[None, :], scores, -1.0e30)
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        values = tl.load(value_ptr + at[:, None] + dims[None, :], mask=valid[:, None] & dim_mask[None, :], other=0.0)
        acc = acc * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        best = new_best
    safe = tl.where(total > 0, total, 1.0)
    result = acc / safe[:, None]
    if SPLIT:
        index = (row * KV_HEADS * GROUP + kv_head * GROUP + heads) * num_splits + split
        tl.store(partial_ptr + index[:, None] * HEAD + dims[None, :], result, mask=q_mask)
        lse = tl.where(total > 0, best + tl.log2(safe), -1.0e30)
        tl.store(lse_ptr + index, lse, mask=head_mask)
    else:
        out_at = (row * KV_HEADS * GROUP + kv_head * GROUP + heads)[:, None] * HEAD + dims[None, :]
        tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def combine_kernel(
    partial_ptr, lse_ptr, out_ptr, num_splits,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS_PAD)
    dims = tl.arange(0, HEAD_PAD)
    mask = splits < num_splits
    lse = tl.load(lse_ptr + item * num_splits + splits, mask=mask, other=-1.0e30)
    weights = tl.where(lse > -1.0e29, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    at = (item * num_splits + splits)[:, None] * HEAD + dims[None, :]
    parts = tl.load(partial_ptr + at, mask=mask[:, None] & (dims < HEAD)[None, :], other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + item * HEAD + dims, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD)
