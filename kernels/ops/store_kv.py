"""store_kv: new keys and values into their slots of the paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op


def _store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write token t's key and value at slot_mapping[t] = block id * block_size + offset; -1 skips the token.

    key and value [T, KV, D], caches [num_blocks, block_size, KV, D] (written in place), slot_mapping int64 [T].
    """
    if bool((slot_mapping < 0).any()):
        kept = (slot_mapping >= 0).nonzero().squeeze(1)
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    # view, not flatten: a cache that could not be viewed would be copied, and the write lost.
    key_cache.view(-1, *key.shape[1:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value.shape[1:]).index_copy_(0, slot_mapping, value)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for slots in ([5], [11, 0, 3], [-1, 7, -1, 2], [-1]):
        key, value = (torch.randn(len(slots), 2, 6, generator=generator).to(device) for _ in range(2))
        caches = torch.full((2, 4, 3, 2, 6), float("nan"), device=device)
        yield key, value, caches[0], caches[1], torch.tensor(slots, device=device)


store_kv = Op(
    _store_kv,
    cases=_cases,
    implementations={"triton": "shoal.kernels.triton.store_kv:store_kv"},
    tolerance=0.0,
)
