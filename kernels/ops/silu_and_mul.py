"""silu_and_mul: the gate of a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op


def _silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension: [..., 2 * size] -> [..., size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 2), (5, 34), (0, 8)):
        yield (torch.randn(shape, generator=generator).to(device) * 4,)


silu_and_mul = Op(
    _silu_and_mul, cases=_cases, implementations={"triton": "shoal.kernels.triton.activation:silu_and_mul"}
)
