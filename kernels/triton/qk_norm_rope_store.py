"""qk_norm_rope_store in Triton: a token's queries are one program, its keys and values another.

Rotated keys go to the cache and, as queries do, side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.dependent import launch_options, wait_for_previous


@triton.jit
def _norm_rope(
    base, heads, mask, dims, half_mask, weight_ptr, cos, sin, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Both halves of each head [heads, HEAD / 2], normalized and rotated, in float32."""
    at = heads[:, None] * HEAD + dims[None, :]
    first = tl.load(base + at, mask=mask, other=0.0)
    second = tl.load(base + at + HEAD // 2, mask=mask, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD
        scale = tl.rsqrt(mean + eps)[:, None]
        low = tl.load(weight_ptr + dims, mask=half_mask, other=0.0).to(tl.float32)[None, :]
        high = tl.load(weight_ptr + HEAD // 2 + dims, mask=half_mask, other=0.0).to(tl.float32)[None, :]
        # Rounded where the reference rounds: after the norm, and after the weight.
        first = ((first * scale).to(dtype).to(tl.float32) * low).to(dtype).to(tl.float32)
        second = ((second * scale).to(dtype).to(tl.float32) * high).to(dtype).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def qk_norm_rope_store_kernel(
    qkv_ptr, query_weight_ptr, key_weight_ptr, cos_sin_ptr, positions_ptr, key_ptr, value_ptr, slots_ptr, out_ptr,
    eps, qkv_stride, block_stride, token_stride, head_stride, block_size,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, KV_HEADS: tl.constexpr, KV_PAD: tl.constexpr,
    HEAD: tl.constexpr, HALF_PAD: tl.constexpr, HEAD_PAD: tl.constexpr, NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HALF_PAD)
    half_mask = dims < HEAD // 2
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_sin_ptr + position * HEAD + dims, mask=half_mask, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * HEAD + HEAD // 2 + dims, mask=half_mask, other=0.0)[None, :]
    slot = tl.load(slots_ptr + token)
    wait_for_previous(DEPENDENT)
    row = qkv_ptr + token * qkv_stride
    out_row = out_ptr + token * (HEADS + KV_HEADS) * HEAD
    keys = row + HEADS * HEAD
    dtype = out_ptr.dtype.element_ty
    if tl.program_id(1) == 0:
        heads = tl.arange(0, HEADS_PAD)
        mask = (heads < HEADS)[:, None] & half_mask[None, :]
        low, high = _norm_rope(row, heads, mask, dims, half_mask, query_weight_ptr, cos, sin, eps, HEAD, NORM)
        out = out_row + heads[:, None] * HEAD + dims[None, :]
        tl.store(out, low.to(dtype), mask=mask)
        tl.store(out + HEAD // 2, high.to(dtype), mask=mask)
    else:
        kv_heads = tl.arange(0, KV_PAD)
        whole = tl.arange(0, HEAD_PAD)
        place = (slot // block_size) * block_stride + (slot % block_size) * token_stride
        place += kv_heads[:, None].to(tl.int64) * head_stride
        there = (kv_heads < KV_HEADS)[:, None]
        value_mask = there & (slot >= 0) & (whole < HEAD)[None, :]
        values = tl.load(keys + KV_HEADS * HEAD + kv_heads[:, None] * HEAD + whole[None, :], mask=value_mask)
        out_mask = there & half_mask[None, :]
        first, second = _norm_rope(keys, kv_heads, out_mask, dims, half_mask, key_weight_ptr, cos, sin, eps, HEAD, NORM)
        beside = out_row + (HEADS + kv_heads[:, None]) * HEAD + dims[None, :]
        tl.store(beside, first.to(dtype), mask=out_mask)
        tl.store(beside + HEAD // 2, second.to(dtype), mask=out_mask)
        key_mask = out_mask & (slot >= 0)
        tl.store(key_ptr + place + dims[None, :], first.to(dtype), mask=key_mask)
        tl.store(key_ptr + place + HEAD // 2 + dims[None, :], second.to(dtype), mask=key_mask)
        tl.store(value_ptr + place + whole[None, :], values, mask=value_mask)


def qk_norm_rope_store(
    qkv: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See kernels/ops/qk_norm_rope_store.py."""
    _, block_size, kv_heads, size = key_cache.shape
    num_tokens = qkv.shape[0]
    rotated = torch.empty((num_tokens, num_heads + kv_heads, size), dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        qk_norm_rope_store_kernel[(num_tokens, 2)](
            qkv,
            query_weight,
            key_weight,
            cos_sin,
            positions,
            key_cache,
            value_cache,
            slot_mapping,
            rotated,
            eps,
            qkv.stride(0),
            key_cache.stride(0),
            key_cache.stride(1),
            key_cache.stride(2),
            block_size,
            HEADS=num_heads,
            HEADS_PAD=triton.next_power_of_2(num_heads),
            KV_HEADS=kv_heads,
            KV_PAD=triton.next_power_of_2(kv_heads),
            HEAD=size,
            HALF_PAD=triton.next_power_of_2(size // 2),
            HEAD_PAD=triton.next_power_of_2(size),
            NORM=query_weight is not None,
            num_warps=4,
            **launch_options(qkv.device),
        )
    value = qkv[:, (num_heads + kv_heads) * size :].unflatten(1, (kv_heads, size))
    return rotated[:, :num_heads], rotated[:, num_heads:], value
