"""paged_attention: causal attention of packed query tokens over a paged KV cache.

The reference is also what a CPU rank runs, so it is written for speed there: rows that decode go through a few
batched matrix products, in groups of similar length; each other row is computed from its own gathered context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from shoal.kernels.op import Op

# Bytes of keys (padding included) that one group of decoding rows gathers at most, and as many of values. A CPU wants
# them to stay in its own cache.
_GROUP_BYTES_CPU = 2 << 20
_GROUP_BYTES = 256 << 20
# A row joins a group while the group's padding stays below this share.
_MAX_PADDING = 0.25


def _paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row r's query token i stands at position seq_lens[r] - q_len + i and sees the positions up to its own.

    query [T, H, D]; caches [num_blocks, block_size, KV, D], H a multiple of KV; cu_seqlens_q int32 [R + 1], offsets of
    the rows' query tokens; seq_lens int32 [R], context with this pass's tokens; block_tables int32 [R, max_blocks].
    Returns [T, H, D]. Cache slots past a row's seq_len and block-table entries past its need are never used: they may
    hold anything. max_query_len and max_seq_len are upper bounds, for kernels that size their grid without a sync.
    key and value [T, KV, D]: what the cache holds of this pass's tokens, once more, where kernels may read it faster.
    """
    starts, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    output = torch.empty_like(query)
    decoding = []
    for row, length in enumerate(lengths):
        num_queries = starts[row + 1] - starts[row]
        if num_queries == 1:
            decoding.append(row)
        elif num_queries > 1:
            span = slice(starts[row], starts[row + 1])
            output[span] = _attend_row(query[span], key_cache, value_cache, block_tables[row], length, scale)
    if decoding:
        decoding.sort(key=lengths.__getitem__)
        rows = torch.tensor(decoding, device=query.device)
        tokens = cu_seqlens_q[rows].long()
        cache = (key_cache, value_cache)
        output[tokens] = _attend_decode(
            query[tokens], *cache, seq_lens[rows], block_tables[rows], [lengths[row] for row in decoding], scale
        )
    return output


def _attend_row(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    length: int,
    scale: float,
) -> torch.Tensor:
    """One row with several query tokens [Q, H, D] -> [Q, H, D]."""
    block_size, num_queries = key_cache.shape[1], query.shape[0]
    blocks = block_table[: -(-length // block_size)].long()
    key, value = (
        cache.index_select(0, blocks).flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0)
        for cache in (key_cache, value_cache)
    )
    mask = None
    if length != num_queries:
        mask = torch.ones(num_queries, length, dtype=torch.bool, device=query.device).tril(length - num_queries)
    result = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key_cache.shape[2],
    )
    return result.squeeze(0).transpose(0, 1)


def _attend_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Rows with one query token each, shortest context first: query [n, H, D] -> [n, H, D]."""
    token_bytes = key_cache[0, 0].numel() * key_cache.element_size()
    limit = _GROUP_BYTES_CPU if query.device.type == "cpu" else _GROUP_BYTES
    parts = []
    for first, last in _groups(lengths, limit // token_bytes):
        ends = seq_lens[first:last].unsqueeze(1)
        slots = _slots(block_tables[first:last], ends, lengths[last - 1], key_cache.shape[1])
        parts.append(_attend_group(query[first:last], key_cache, value_cache, slots, ends, scale))
    return torch.cat(parts)


def _groups(lengths: Sequence[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Spans (first, last + 1) of ascending lengths: little padding, and at most `max_tokens` with it, or one row."""
    first = total = 0
    for row, length in enumerate(lengths):
        padded = (row - first + 1) * length
        if row > first and (padded > max_tokens or padded - total - length > _MAX_PADDING * padded):
            yield first, row
            first, total = row, 0
        total += length
    yield first, len(lengths)


def _slots(block_tables: torch.Tensor, ends: torch.Tensor, longest: int, block_size: int) -> torch.Tensor:
    """int64 [n, longest] cache slots of each row's positions; past its end a row repeats its first slot (real data).

    ends [n, 1]: the rows' lengths.
    """
    positions = torch.arange(longest, device=ends.device)
    positions = torch.where(positions < ends, positions, 0)
    blocks = block_tables.long().gather(1, positions // block_size)
    return blocks * block_size + positions % block_size


def _attend_group(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One group of decoding rows: query [n, H, D], slots [n, L], ends [n, 1] -> [n, H, D]."""
    n, num_heads, size = query.shape
    kv_heads, longest = key_cache.shape[2], slots.shape[1]
    key, value = (
        cache.view(-1, kv_heads * size).index_select(0, slots.view(-1)).view(n, longest, kv_heads, size)
        for cache in (key_cache, value_cache)
    )
    outside = torch.arange(longest, device=query.device) >= ends
    mask = torch.zeros(n, longest, dtype=query.dtype, device=query.device).masked_fill_(outside, float("-inf"))
    # The heads that share a KV head go in as its query tokens: nothing is repeated.
    result = scaled_dot_product_attention(
        query.view(n, kv_heads, num_heads // kv_heads, size),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask.view(n, 1, 1, longest),
        scale=scale,
    )
    return result.reshape(n, num_heads, size)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (  # rows of (query tokens, context), heads, KV heads, head size, block size
        ([(1, 1)], 1, 1, 4, 1),
        ([(1, 5), (1, 17), (1, 3), (1, 16)], 6, 2, 8, 4),
        ([(7, 7), (1, 9), (3, 11), (2, 2), (1, 1)], 4, 4, 6, 3),
        ([(0, 4), (5, 40), (1, 33)], 9, 3, 16, 16),
    )
    for rows, heads, kv_heads, size, block_size in shapes:
        needs = [-(-context // block_size) for _, context in rows]
        ids = torch.randperm(sum(needs) + 3, generator=generator).to(torch.int32)
        caches = torch.full((2, len(ids), block_size, kv_heads, size), float("nan"))
        tables = torch.randint(-(2**31), 2**31 - 1, (len(rows), max(needs) + 2), generator=generator, dtype=torch.int32)
        own = []
        for row, (tokens, context) in enumerate(rows):
            tables[row, : needs[row]] = ids[sum(needs[:row]) :][: needs[row]]
            slots = _slots(tables[row : row + 1], torch.tensor([[context]]), context, block_size)[0]
            caches.flatten(1, 2)[:, slots] = torch.randn(2, context, kv_heads, size, generator=generator)
            own.append(caches.flatten(1, 2)[:, slots[context - tokens :]])
        starts = torch.tensor([0, *(tokens for tokens, _ in rows)]).cumsum(0).to(torch.int32)
        contexts = torch.tensor([context for _, context in rows], dtype=torch.int32)
        query = torch.randn(int(starts[-1]), heads, size, generator=generator)
        tensors = (t.to(device) for t in (query, caches[0], caches[1], starts, contexts, tables))
        longest = max(tokens for tokens, _ in rows), max(context for _, context in rows)
        yield *tensors, size**-0.5, *longest, *torch.cat(own, dim=1).to(device)


paged_attention = Op(
    _paged_attention,
    cases=_cases,
    implementations={"triton": "shoal.kernels.triton.paged_attention:paged_attention"},
)
