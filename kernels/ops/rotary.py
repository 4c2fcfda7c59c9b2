"""rotary: rotary position embedding of queries and keys, neox style (pairs are a head's two halves)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op


def _rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated query and key, in their own dtype.

    query [T, H, D], key [T, KV, D]; cos and sin float32 [T, D / 2]. Computed in query's dtype, as checkpoints expect.
    """
    cos, sin = cos.to(query.dtype).unsqueeze(1), sin.to(query.dtype).unsqueeze(1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = first.shape[-1]
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated[..., half:]).addcmul_(first, sin)
    return rotated


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, kv_heads, size in ((1, 1, 1, 2), (5, 6, 2, 16), (3, 4, 4, 10)):
        query, key = (torch.randn(tokens, n, size, generator=generator).to(device) for n in (heads, kv_heads))
        angles = torch.randn(tokens, size // 2, generator=generator).to(device) * 10
        yield query, key, angles.cos(), angles.sin()


rotary = Op(_rotary, cases=_cases)
