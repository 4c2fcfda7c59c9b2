"""Attention over the paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shoal.kernels.ops.paged_attention import paged_attention
from shoal.kernels.ops.store_kv import store_kv

if TYPE_CHECKING:
    from shoal.workers.batch import AttentionMetadata


class Attention(torch.nn.Module):
    """Writes this pass's keys and values into the cache, then attends to each row's whole context."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads  # of this rank, as num_kv_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: torch.Tensor,
    ) -> torch.Tensor:
        """query [T, num_heads * D], key and value [T, num_kv_heads * D] -> [T, num_heads * D].

        `kv_cache` is this layer's, [2, num_blocks, block_size, num_kv_heads, D].
        """
        key, value = (x.view(-1, self.num_kv_heads, self.head_dim) for x in (key, value))
        store_kv(key, value, kv_cache[0], kv_cache[1], metadata.slot_mapping)
        return self.attend(query.view(-1, self.num_heads, self.head_dim), metadata, kv_cache, key, value)

    def attend(
        self,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, num_heads, D] -> [T, num_heads * D], over keys and values that are in the cache already.

        key and value [T, num_kv_heads, D]: those of the same tokens once more, where they are at hand.
        """
        output = paged_attention(
            query,
            kv_cache[0],
            kv_cache[1],
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            metadata.block_tables,
            self.scale,
            metadata.max_query_len,
            metadata.max_seq_len,
            key,
            value,
        )
        return output.view(-1, self.num_heads * self.head_dim)
