"""store_kv in Triton: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def store_kv_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slots_ptr,
    key_stride, value_stride, block_stride, token_stride, head_stride, block_size,
    KV_HEADS: tl.constexpr, KV_PAD: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    heads = tl.arange(0, KV_PAD)[:, None]
    dims = tl.arange(0, HEAD_PAD)[None, :]
    mask = (heads < KV_HEADS) & (dims < HEAD)
    source = heads * HEAD + dims
    target = (slot // block_size) * block_stride + (slot % block_size) * token_stride + heads * head_stride + dims
    tl.store(key_cache_ptr + target, tl.load(key_ptr + token * key_stride + source, mask=mask), mask=mask)
    tl.store(value_cache_ptr + target, tl.load(value_ptr + token * value_stride + source, mask=mask), mask=mask)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See kernels/ops/store_kv.py. A token's heads must lie one behind the other; tokens may have any stride."""
    num_tokens, kv_heads, size = key.shape
    assert key.stride()[1:] == value.stride()[1:] == (size, 1)
    if num_tokens:
        store_kv_kernel[(num_tokens,)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            key.stride(0),
            value.stride(0),
            key_cache.stride(0),
            key_cache.stride(1),
            key_cache.stride(2),
            key_cache.shape[1],
            KV_HEADS=kv_heads,
            KV_PAD=triton.next_power_of_2(kv_heads),
            HEAD=size,
            HEAD_PAD=triton.next_power_of_2(size),
            num_warps=4,
        )
