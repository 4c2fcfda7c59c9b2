"""paged_attention in Triton: one kernel for rows that decode, one for everything else."""

from __future__ import annotations

import torch
import triton

from shoal.kernels.triton.attention_decode import combine_kernel, decode_kernel
from shoal.kernels.triton.attention_prefill import prefill_kernel

_LOG2E = 1.4426950408889634
_FULL_GRID = 264  # two programs a multiprocessor of an H100; more rows than that need no splits
_MIN_SPLIT = 256  # positions worth a program of their own


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
) -> torch.Tensor:
    """See kernels/ops/paged_attention.py. Grids depend on shapes and on the two bounds only: graphs may record it."""
    query = query.contiguous()
    out = torch.empty_like(query)
    if query.shape[0]:
        run = _decode if max_query_len == 1 else _prefill
        run(query, key_cache, value_cache, cu_seqlens_q, seq_lens, block_tables, scale * _LOG2E, max_seq_len, out)
    return out


def num_splits(num_rows: int, kv_heads: int, max_seq_len: int) -> int:
    """Programs that share a row and KV head: 1 where rows alone fill the device."""
    programs = num_rows * kv_heads
    if 2 * programs > _FULL_GRID:
        return 1
    return max(1, min(_FULL_GRID // programs, -(-max_seq_len // _MIN_SPLIT), 64))


def _decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale_log2: float,
    max_seq_len: int,
    out: torch.Tensor,
) -> None:
    num_rows, num_heads, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    group = num_heads // kv_heads
    head_pad = max(16, triton.next_power_of_2(head_dim))
    exact = query.dtype == torch.float32
    splits = num_splits(num_rows, kv_heads, max_seq_len)
    partial = lse = out
    if splits > 1:
        partial = torch.empty((num_rows, num_heads, splits, head_dim), dtype=torch.float32, device=query.device)
        lse = torch.empty((num_rows, num_heads, splits), dtype=torch.float32, device=query.device)
    decode_kernel[(num_rows * kv_heads, splits)](
        query,
        key_cache,
        value_cache,
        seq_lens,
        block_tables,
        out,
        partial,
        lse,
        scale_log2,
        num_heads * head_dim,
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        splits,
        BLOCK_SIZE=block_size,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD=head_dim,
        HEAD_PAD=head_pad,
        TILE=32 if exact else 128 if head_pad <= 128 else 64,
        SPLIT=splits > 1,
        KV_HEADS=kv_heads,
        PRECISION="ieee",
        num_warps=4,
        num_stages=1 if exact else 3,
    )
    if splits > 1:
        combine_kernel[(num_rows * num_heads,)](
            partial,
            lse,
            out,
            splits,
            HEAD=head_dim,
            HEAD_PAD=head_pad,
            SPLITS_PAD=triton.next_power_of_2(splits),
            num_warps=1,
        )


def _prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale_log2: float,
    max_seq_len: int,
    out: torch.Tensor,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    num_rows = seq_lens.shape[0]
    group = num_heads // kv_heads
    head_pad = max(16, triton.next_power_of_2(head_dim))
    exact = query.dtype == torch.float32
    block_m = max(32 if exact else 128, triton.next_power_of_2(group))
    block_q = block_m // group
    num_tiles = num_tokens // block_q + num_rows
    prefill_kernel[(kv_heads, num_tiles)](
        query,
        key_cache,
        value_cache,
        cu_seqlens_q,
        seq_lens,
        block_tables,
        out,
        scale_log2,
        num_rows,
        num_tiles,
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        GROUP=group,
        HEAD=head_dim,
        HEAD_PAD=head_pad,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        TILE=32 if exact else 64,
        KV_HEADS=kv_heads,
        PRECISION="ieee",
        num_warps=4 if exact else 8,
        num_stages=1 if exact else 3,
    )
