"""qk_norm_rope_store: from a fused projection to rotated queries, with keys and values in the paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op
from shoal.kernels.ops.rms_norm import rms_norm
from shoal.kernels.ops.rotary import rotary
from shoal.kernels.ops.store_kv import store_kv


def _qk_norm_rope_store(
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
    """Split, normalize head by head where weights are given, rotate, store; returns queries [T, H, D], keys and values
    [T, KV, D], any of them parts of wider tensors.

    qkv [T, (H + 2 * KV) * D]; weights [D], both or neither; cos_sin float32 [positions, D], cosines then sines of each
    position; positions int64 [T]; caches [num_blocks, block_size, KV, D], written at slot_mapping int64 [T] (-1: not).
    """
    kv_heads, size = key_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * kv_heads, size)
    query, key, value = heads.split([num_heads, kv_heads, kv_heads], dim=1)
    if query_weight is not None and key_weight is not None:
        query, key = (
            rms_norm.reference(query, query_weight, eps)[0],
            rms_norm.reference(key, key_weight, eps)[0],
        )
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    query, key = rotary.reference(query, key, cos, sin)
    store_kv.reference(key, value, key_cache, value_cache, slot_mapping)
    return query, key, value


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, kv_heads, size, normed in ((1, 1, 1, 2, False), (5, 6, 2, 16, True), (7, 9, 3, 10, True)):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size, generator=generator).to(device)
        weights = (torch.randn(2, size, generator=generator) + 1).to(device)
        angles = torch.randn(20, size // 2, generator=generator).to(device) * 10
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
        positions = torch.randint(0, 20, (tokens,), generator=generator).to(device)
        caches = torch.full((2, 4, 3, kv_heads, size), float("nan"), device=device)
        slots = torch.randperm(12, generator=generator)[:tokens].to(device)
        slots[::3] = -1
        query_weight, key_weight = weights if normed else (None, None)
        yield qkv, query_weight, key_weight, 1e-5, cos_sin, positions, caches[0], caches[1], slots, heads


qk_norm_rope_store = Op(
    _qk_norm_rope_store,
    cases=_cases,
    implementations={"triton": "shoal.kernels.triton.qk_norm_rope_store:qk_norm_rope_store"},
)
