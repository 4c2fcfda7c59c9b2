"""Paged attention of rows with one query token each (decode): one launch, equal work for every program.

The contexts of all rows are cut into tiles; each program group takes a share of the units in the list of them, one
program of the group for each KV head. Shares are equal, or those of the first groups a unit longer. So no
multiprocessor waits for another's longer row, and a batch of few long rows is split without being told: lengths are
read on the GPU only. Units are tiles and, before the tiles of each row, what makes shares fair: OPENING units for the
time in which a row's first tile is waited for; or, where rows are about equally long, as many as make them equal, so
that shares are whole rows or whole parts of them. Where a share begins or ends inside a row, the parts meet in memory,
and the last program to arrive there adds them up, in the groups' order.

Where FUSED, the queries are rows of the merged projection, not yet normalized and rotated, and each row's newest key
and value are there too. Every part of a row makes its queries itself; the part with the row's end also makes the key,
writes it and the value to the cache, and begins with that position, which nobody reads back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.triton.attention_newest import load_heads, load_weight, norm_rope, rotation
from shoal.kernels.triton.attention_tiles import load_blocks, token_offsets
from shoal.kernels.triton.dependent import let_next_start, prefetch, wait_only


@triton.jit
def _count_tiles(row, num_rows, starts_ptr, seq_lens_ptr, TILE: tl.constexpr, MIXED: tl.constexpr):
    """Tiles of these rows' contexts; 0 for rows that are empty or, where rows are mixed, not decoding."""
    inside = row < num_rows
    seq_len = tl.load(seq_lens_ptr + row, mask=inside, other=0)
    if MIXED:
        start = tl.load(starts_ptr + row, mask=inside, other=0)
        stop = tl.load(starts_ptr + row + 1, mask=inside, other=0)
        seq_len = tl.where(stop - start == 1, seq_len, 0)
    return tl.cdiv(seq_len, TILE)


@triton.jit
def _row_of(unit, rows, ends, num_rows):
    """The row that holds this unit and that row's first one, as row << 32 | first, so far as these rows go."""
    passed = (ends <= unit) & (rows < num_rows)
    return tl.max(tl.where(passed, (rows + 1).to(tl.int64) << 32 | ends.to(tl.int64), 0), 0)


@triton.jit
def _fit(full, longest, num_tiles, num_groups, min_share):
    """Units of a share and of a row, so that shares end where rows or equal parts of them do; 0, 0 where too many
    programs would have nothing to do, or rows too unequal."""
    used = tl.maximum(tl.minimum(num_groups, full * longest // min_share), 1)
    parts = tl.maximum(used // tl.maximum(full, 1), 1)
    share = tl.where(full > used, tl.cdiv(full, used) * longest, tl.cdiv(longest, parts))
    row_units = tl.where(full > used, longest, parts * share)
    fits = share * used - num_tiles <= num_tiles // 16
    return tl.where(fits, share, 0), tl.where(fits, row_units, 0)


@triton.jit
def _count_units(tiles, row_units, OPENING: tl.constexpr):
    """Of rows with so many tiles; row_units: of each row, where not 0."""
    return tl.where(tiles > 0, tl.where(row_units > 0, row_units, tiles + OPENING), 0)


@triton.jit
def _find_share(
    group, num_groups, starts_ptr, seq_lens_ptr, num_rows, min_share, TILE: tl.constexpr, OPENING: tl.constexpr,
    ROWS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Units of a share, and how many of the first groups have one more; this group's units [begin, end); the row that
    holds `begin`, and that row's own first unit; units of each row, 0 where they differ; how many rows have no tiles.
    """
    lanes = tl.arange(0, ROWS)
    tiles = _count_tiles(lanes, num_rows, starts_ptr, seq_lens_ptr, TILE, MIXED)
    num_tiles = tl.sum(tiles, 0)
    longest = tl.max(tiles, 0)
    full = tl.sum((tiles > 0).to(tl.int32), 0)
    for chunk in range(ROWS, num_rows, ROWS):
        more = _count_tiles(chunk + lanes, num_rows, starts_ptr, seq_lens_ptr, TILE, MIXED)
        num_tiles += tl.sum(more, 0)
        longest = tl.maximum(longest, tl.max(more, 0))
        full += tl.sum((more > 0).to(tl.int32), 0)
    share, row_units = _fit(full, longest, num_tiles, num_groups, min_share)
    num_units = tl.where(row_units > 0, full * row_units, num_tiles + full * OPENING)
    longer = tl.cast(0, num_units.dtype)
    if share == 0:
        used = tl.maximum(tl.minimum(num_groups, num_units // min_share), 1)
        share = num_units // used
        longer = num_units - share * used
    begin = group * share + tl.minimum(group, longer)
    end = tl.minimum(begin + share + (group < longer).to(tl.int32), num_units)
    ends = tl.cumsum(_count_units(tiles, row_units, OPENING), 0)
    found = _row_of(begin, lanes, ends, num_rows)
    for chunk in range(ROWS, num_rows, ROWS):
        before = tl.max(ends, 0)
        more = _count_tiles(chunk + lanes, num_rows, starts_ptr, seq_lens_ptr, TILE, MIXED)
        ends = before + tl.cumsum(_count_units(more, row_units, OPENING), 0)
        found = tl.maximum(found, _row_of(begin, chunk + lanes, ends, num_rows))
    row, row_begin = 0, 0
    if num_rows > 0:  # always, so that 0 is among the loop's first values: else Triton 3.7 pipelines nothing in it
        row, row_begin = (found >> 32).to(tl.int32), found.to(tl.int32)
    return share, longer, begin, end, row, row_begin, row_units, num_rows - full


@triton.jit
def _group_of(unit, share, longer):
    """The group whose share holds this unit."""
    of_longer = longer * (share + 1)
    return tl.where(unit < of_longer, unit // (share + 1), longer + (unit - of_longer) // share)


@triton.jit
def _find_span(seq_len, row_begin, begin, end, row_units, TILE: tl.constexpr, OPENING: tl.constexpr):
    """Of a row that begins at this unit: the unit of its first tile, its end; positions of it inside [begin, end)."""
    num_tiles = tl.cdiv(seq_len, TILE)
    row_end = row_begin + _count_units(num_tiles, row_units, OPENING)
    row_tiles = row_end - num_tiles
    return row_tiles, row_end, tl.maximum(begin - row_tiles, 0) * TILE, tl.minimum((end - row_tiles) * TILE, seq_len)


@triton.jit
def _prefetch_cache(
    first, last, table, key_ptr, value_ptr, kv_base, block_stride, token_stride,
    BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Asks for keys and values of positions [first, last), AHEAD at most. One of them may just be written: that is as
    well, since nothing is read."""
    LINE: tl.constexpr = 1024 // key_ptr.dtype.element_ty.primitive_bitwidth  # elements of a cache line
    LINES: tl.constexpr = (HEAD_PAD + LINE - 1) // LINE
    pos = tl.minimum(first + tl.arange(0, AHEAD), last - 1)
    block = tl.load(table + pos // BLOCK_SIZE).to(tl.int64)
    at = kv_base + block * block_stride + (pos % BLOCK_SIZE) * token_stride
    at = at[:, None] + tl.minimum(tl.arange(0, LINES) * LINE, HEAD - 1)[None, :]
    prefetch(key_ptr + at, DEPENDENT)
    prefetch(value_ptr + at, DEPENDENT)


@triton.jit
def _attend(
    query, acc, total, best, block, first, last, table, key_ptr, value_ptr, kv_base, scale_log2, block_stride,
    token_stride, BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds positions [first, last) of one row to: the weighted sum of values, the weights' sum, the best score.

    Block ids, the first ones by the caller, are loaded a tile ahead: loads of keys and values then wait for nothing.
    """
    offs = tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_PAD)
    for tile in range(first, last, TILE):
        valid = offs < last - tile
        mask = valid[:, None] & (dims < HEAD)[None, :]
        at = token_offsets(block, tile, block_stride, token_stride, BLOCK_SIZE, TILE) + kv_base
        at = at[:, None] + dims[None, :]
        block = load_blocks(table, tile + TILE, last, BLOCK_SIZE, TILE)
        keys = tl.load(key_ptr + at, mask=mask, other=0.0)
        values = tl.load(value_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(valid[None, :], scores, -1.0e30)
        new_best = tl.maximum(best, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        best = new_best
    return acc, total, best


@triton.jit
def _load_part(
    partial_ptr, lse_ptr, group, first_group, last_group, kv_head,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """One group's part of a cut row: logarithm of the weights' sum [HEADS], weighted mean of values [HEADS, HEAD_PAD];
    beyond the last group one that weighs nothing."""
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, HEAD_PAD)
    slot = (group * 2 + (group == first_group).to(tl.int32)) * KV_HEADS + kv_head
    at = slot * GROUP + heads
    there = (group <= last_group) & (heads < GROUP)
    # Another multiprocessor wrote these: the nearest cache that both see is L2.
    lse = tl.load(lse_ptr + at, mask=there, other=-1.0e30, cache_modifier=".cg")
    mask = there[:, None] & (dims < HEAD)[None, :]
    part = tl.load(partial_ptr + at[:, None] * HEAD + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    return lse, part


@triton.jit
def _add_some(
    best, total, acc, partial_ptr, lse_ptr, group, first_group, last_group, kv_head,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Adds PARTS parts from this group's on to: the best score, the weights' sum, the weighted sum of values.

    Each part is a tensor of its own, and all are loaded before the first is used: of one tensor with all of them,
    values are loaded one by one.
    """
    lses, parts = tl.tuple([]), tl.tuple([])
    new_best = best
    for i in tl.static_range(PARTS):
        lse, part = _load_part(
            partial_ptr, lse_ptr, group + i, first_group, last_group, kv_head, GROUP, HEAD, HEAD_PAD, HEADS, KV_HEADS
        )
        lses += (lse,)
        parts += (part,)
    for i in tl.static_range(PARTS):
        new_best = tl.maximum(new_best, lses[i])
    fade = tl.exp2(best - new_best)
    total, acc = total * fade, acc * fade[:, None]
    for i in tl.static_range(PARTS):
        weight = tl.exp2(lses[i] - new_best)
        total += weight
        acc += parts[i] * weight[:, None]
    return new_best, total, acc


@triton.jit
def _add_parts(
    partial_ptr, lse_ptr, first_group, last_group, kv_head, out_ptr, out_at,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, HEADS: tl.constexpr, FEW: tl.constexpr,
    MANY: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Write a row that was cut: its parts are the first group's second one, and the others' first."""
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, HEAD_PAD)
    best = tl.full([HEADS], -1.0e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, HEAD_PAD], tl.float32)
    if last_group - first_group < FEW:  # as most are where there are many rows
        best, total, acc = _add_some(
            best, total, acc, partial_ptr, lse_ptr, first_group, first_group, last_group, kv_head,
            GROUP, HEAD, HEAD_PAD, HEADS, FEW, KV_HEADS,
        )  # fmt: skip
    else:
        for group in range(first_group, last_group + 1, MANY):
            best, total, acc = _add_some(
                best, total, acc, partial_ptr, lse_ptr, group, first_group, last_group, kv_head,
                GROUP, HEAD, HEAD_PAD, HEADS, MANY, KV_HEADS,
            )  # fmt: skip
    at = out_at + (kv_head * GROUP + heads)[:, None] * HEAD + dims[None, :]
    mask = (heads < GROUP)[:, None] & (dims < HEAD)[None, :]
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _are_unused(rows, num_rows, starts_ptr, seq_lens_ptr, MIXED: tl.constexpr):
    """Which of these rows are padding; mixed in, the rows that do not decode are another kernel's."""
    inside = rows < num_rows
    unused = inside & (tl.load(seq_lens_ptr + rows, mask=inside, other=1) == 0)
    if MIXED:
        start = tl.load(starts_ptr + rows, mask=unused, other=0)
        unused = unused & (tl.load(starts_ptr + rows + 1, mask=unused, other=0) == start + 1)
    return unused


@triton.jit
def _store_zeros(
    rows, unused, starts_ptr, out_ptr, kv_head,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """What padding gets, of one KV head's query heads."""
    heads = tl.arange(0, HEADS)[None, :, None]
    dims = tl.arange(0, HEAD_PAD)[None, None, :]
    tokens = rows
    if MIXED:
        tokens = tl.load(starts_ptr + rows, mask=unused, other=0)
    at = (tokens.to(tl.int64) * KV_HEADS + kv_head)[:, None, None] * (GROUP * HEAD) + heads * HEAD + dims
    zeros = tl.zeros([rows.shape[0], HEADS, HEAD_PAD], out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, zeros, mask=unused[:, None, None] & (heads < GROUP) & (dims < HEAD))


@triton.jit(do_not_specialize=["num_rows", "min_share", "table_stride"])
def decode_kernel(
    query_ptr, key_ptr, value_ptr, starts_ptr, seq_lens_ptr, tables_ptr, out_ptr, partial_ptr, lse_ptr, arrived_ptr,
    query_weight_ptr, key_weight_ptr, cos_sin_ptr, eps,
    scale_log2, num_rows, min_share, query_stride, query_head_stride, block_stride, token_stride, head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr, OPENING: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, PADS: tl.constexpr, AHEAD: tl.constexpr, LATE: tl.constexpr,
    MIXED: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % KV_HEADS
    group = tl.program_id(0) // KV_HEADS
    num_groups = tl.num_programs(0) // KV_HEADS
    heads = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, HEAD_PAD)
    mask = (heads < GROUP)[:, None] & (dims < HEAD)[None, :]
    pads = group + tl.arange(0, PADS) * num_groups  # looked at here, where others' loads are waited for too
    unused = _are_unused(pads, num_rows, starts_ptr, seq_lens_ptr, MIXED)
    share, longer, begin, end, row, row_begin, row_units, empty = _find_share(
        group, num_groups, starts_ptr, seq_lens_ptr, num_rows, min_share, TILE, OPENING, ROWS, MIXED
    )  # fmt: skip
    # Lengths, tables and all of the cache but the newest tokens are older than the kernel before this one.
    if DEPENDENT and AHEAD:
        seq_len = tl.load(seq_lens_ptr + tl.minimum(row, num_rows - 1))
        _, _, first, last = _find_span(seq_len, row_begin, begin, end, row_units, TILE, OPENING)
        if (begin < end) & (first < last):
            _prefetch_cache(
                first, last, tables_ptr + tl.cast(row, tl.int64) * table_stride, key_ptr, value_ptr,
                kv_head.to(tl.int64) * head_stride, block_stride, token_stride,
                BLOCK_SIZE, HEAD, HEAD_PAD, AHEAD, DEPENDENT,
            )  # fmt: skip
    if FUSED:  # angles are of the row that is next
        NORM: tl.constexpr = query_weight_ptr is not None
        query_weight = load_weight(query_weight_ptr, HEAD, HEAD_PAD)
        key_weight = load_weight(key_weight_ptr, HEAD, HEAD_PAD)
        position = tl.maximum(tl.load(seq_lens_ptr + tl.minimum(row, num_rows - 1)), 1) - 1
        cos, sin = rotation(cos_sin_ptr, position, HEAD, HEAD_PAD)
    wait_only(DEPENDENT)
    if not LATE:
        let_next_start(DEPENDENT)
    if empty > 0:
        _store_zeros(pads, unused, starts_ptr, out_ptr, kv_head, GROUP, HEAD, HEAD_PAD, HEADS, KV_HEADS, MIXED)
    while row_begin < end:
        token = row
        seq_len = tl.load(seq_lens_ptr + row)
        if MIXED:
            token = tl.load(starts_ptr + row)
            if tl.load(starts_ptr + row + 1) != token + 1:
                seq_len = 0
        row_tiles, row_end, first, last = _find_span(seq_len, row_begin, begin, end, row_units, TILE, OPENING)
        if FUSED:
            next_len = tl.load(seq_lens_ptr + tl.minimum(row + 1, num_rows - 1))
            next_cos, next_sin = rotation(cos_sin_ptr, tl.maximum(next_len, 1) - 1, HEAD, HEAD_PAD)
        if first < last:
            token64 = tl.cast(token, tl.int64)
            table = tables_ptr + tl.cast(row, tl.int64) * table_stride
            kv_base = kv_head.to(tl.int64) * head_stride
            best = tl.full([GROUP_PAD], -1.0e30, tl.float32)
            total = tl.zeros([GROUP_PAD], tl.float32)
            acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
            block = load_blocks(table, first, last, BLOCK_SIZE, TILE)
            if FUSED:
                # All loads before the first use: each would else be waited for alone.
                qkv = query_ptr + token64 * query_stride
                newest = last == seq_len
                own, partner = load_heads(qkv + kv_head * (GROUP * HEAD), GROUP, HEADS, HEAD, HEAD_PAD)
                key_at = qkv + KV_HEADS * GROUP * HEAD + kv_head * HEAD
                key, key_partner = load_heads(key_at, newest.to(tl.int32), 1, HEAD, HEAD_PAD)
                value_mask = newest & (dims < HEAD)[None, :]
                value = tl.load(key_at + KV_HEADS * HEAD + dims[None, :], mask=value_mask, other=0.0)
                newest_block = tl.load(table + (seq_len - 1) // BLOCK_SIZE).to(tl.int64)
                few = norm_rope(own, partner, *query_weight, cos, sin, eps, HEAD, NORM)
                # Lanes of the product beyond the group's heads repeat them: they are computed anyhow.
                query = tl.broadcast_to(few[None, :, :], [GROUP_PAD // HEADS, HEADS, HEAD_PAD])
                query = tl.reshape(query, [GROUP_PAD, HEAD_PAD])
                if newest:
                    last -= 1
                    key = norm_rope(key, key_partner, *key_weight, cos, sin, eps, HEAD, NORM)
                    cache_at = kv_base + newest_block * block_stride + (last % BLOCK_SIZE) * token_stride
                    cache_at = cache_at + dims[None, :]
                    tl.store(key_ptr + cache_at, key, mask=value_mask)
                    tl.store(value_ptr + cache_at, value, mask=value_mask)
                    score = tl.sum(few.to(tl.float32) * key.to(tl.float32), 1) * scale_log2
                    best = tl.reshape(tl.broadcast_to(score[None, :], [GROUP_PAD // HEADS, HEADS]), [GROUP_PAD])
                    total = tl.full([GROUP_PAD], 1.0, tl.float32)
                    acc = tl.broadcast_to(value.to(tl.float32), [GROUP_PAD, HEAD_PAD])
            else:
                q_at = token64 * query_stride + (kv_head * GROUP + heads)[:, None] * query_head_stride + dims[None, :]
                query = tl.load(query_ptr + q_at, mask=mask, other=0.0)
            acc, total, best = _attend(
                query, acc, total, best, block, first, last, table, key_ptr, value_ptr, kv_base, scale_log2,
                block_stride, token_stride, BLOCK_SIZE, HEAD, HEAD_PAD, TILE, PRECISION,
            )  # fmt: skip
            result = acc / total[:, None]
            out_at = token64 * (KV_HEADS * GROUP * HEAD)
            if (row_tiles >= begin) & (row_end <= end):
                at = out_at + (kv_head * GROUP + heads)[:, None] * HEAD + dims[None, :]
                tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                slot = (group * 2 + (row_tiles >= begin).to(tl.int32)) * KV_HEADS + kv_head
                part = slot * GROUP + heads
                tl.store(lse_ptr + part, best + tl.log2(total), mask=heads < GROUP)
                tl.store(partial_ptr + part[:, None] * HEAD + dims[None, :], result, mask=mask)
                tl.debug_barrier()  # every thread's part is written before the one thread counts it as arrived
                first_group = _group_of(row_tiles, share, longer)
                last_group = _group_of(row_end - 1, share, longer)
                counter = arrived_ptr + first_group * KV_HEADS + kv_head
                if tl.atomic_add(counter, 1, sem="acq_rel") == last_group - first_group:
                    tl.store(counter, 0)  # as the next launch expects it
                    _add_parts(
                        partial_ptr, lse_ptr, first_group, last_group, kv_head, out_ptr, out_at,
                        GROUP, HEAD, HEAD_PAD, HEADS, FEW, MANY, KV_HEADS,
                    )  # fmt: skip
        row_begin = row_end
        row += 1
        if FUSED:
            cos, sin = next_cos, next_sin
    if LATE:
        let_next_start(DEPENDENT)
    if empty > 0:
        for chunk in range(PADS * num_groups, num_rows, PADS * num_groups):
            unused = _are_unused(chunk + pads, num_rows, starts_ptr, seq_lens_ptr, MIXED)
            _store_zeros(
                chunk + pads, unused, starts_ptr, out_ptr, kv_head, GROUP, HEAD, HEAD_PAD, HEADS, KV_HEADS, MIXED
            )
