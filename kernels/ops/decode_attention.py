"""decode_attention: qk_norm_rope_store and paged_attention in one, of a pass in which every row decodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op
from shoal.kernels.ops.paged_attention import paged_attention
from shoal.kernels.ops.qk_norm_rope_store import qk_norm_rope_store


def _decode_attention(
    qkv: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    max_seq_len: int,
    num_heads: int,
) -> torch.Tensor:
    """Row r's one token stands at position seq_lens[r] - 1: its key and value go to that place of the cache, its
    queries see the positions up to it. Returns [R, H, D].

    qkv [R, (H + 2 * KV) * D]; weights [D], both or neither; cos_sin float32 [positions, D], cosines then sines of each
    position; caches [num_blocks, block_size, KV, D]; seq_lens int32 [R], 0 for rows that are padding: they write
    nothing and get zeros; block_tables int32 [R, max_blocks]. max_seq_len is an upper bound of the lengths.
    No row may read what another one writes here: programs of different rows do not wait for each other.
    """
    block_size = key_cache.shape[1]
    live = seq_lens > 0
    positions = torch.where(live, seq_lens - 1, 0).long()
    blocks = block_tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1).long()
    slots = torch.where(live, blocks * block_size + positions % block_size, -1)
    query, _, _ = qk_norm_rope_store.reference(
        qkv, query_weight, key_weight, eps, cos_sin, positions, key_cache, value_cache, slots, num_heads
    )
    output = torch.zeros_like(query)
    starts = torch.arange(int(live.sum()) + 1, dtype=torch.int32, device=qkv.device)
    output[live] = paged_attention.reference(
        query[live], key_cache, value_cache, starts, seq_lens[live], block_tables[live], scale, 1, max_seq_len
    )
    return output


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (  # contexts, heads, KV heads, head size, block size, normed
        ([1], 1, 1, 4, 1, False),
        ([5, 17, 0, 3, 16], 6, 2, 8, 4, True),
        ([0, 33, 40, 1], 9, 3, 10, 16, True),
    )
    for contexts, heads, kv_heads, size, block_size, normed in shapes:
        needs = [-(-context // block_size) for context in contexts]
        ids = torch.randperm(sum(needs) + 3, generator=generator).to(torch.int32)
        caches = torch.full((2, len(ids), block_size, kv_heads, size), float("nan"))
        tables = torch.full((len(contexts), max(needs) + 2), 1 << 30, dtype=torch.int32)
        for row, context in enumerate(contexts):
            mine = ids[sum(needs[:row]) :][: needs[row]]
            tables[row, : needs[row]] = mine
            slots = (mine.long()[:, None] * block_size + torch.arange(block_size)).view(-1)[: max(0, context - 1)]
            caches.flatten(1, 2)[:, slots] = torch.randn(2, len(slots), kv_heads, size, generator=generator)
        qkv = torch.randn(len(contexts), (heads + 2 * kv_heads) * size, generator=generator).to(device)
        weights = (torch.randn(2, size, generator=generator) + 1).to(device)
        angles = torch.randn(max(contexts), size // 2, generator=generator) * 10
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
        seq_lens = torch.tensor(contexts, dtype=torch.int32)
        tensors = (t.to(device) for t in (caches[0], caches[1], seq_lens, tables))
        norms = tuple(weights) if normed else (None, None)
        yield qkv, *norms, 1e-5, cos_sin, *tensors, size**-0.5, max(contexts), heads


decode_attention = Op(
    _decode_attention,
    cases=_cases,
    implementations={"triton": "shoal.kernels.triton.paged_attention:decode_attention"},
)
