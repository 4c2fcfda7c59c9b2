"""layer_norm: mean 0 and variance 1 over the last dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op


def _layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias. x [..., size], weight and bias [size] or None."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, affine in (((1, 8), True), ((7, 33), True), ((3, 5, 16), False), ((0, 4), True)):
        x = torch.randn(shape, generator=generator).to(device) + 2
        weight, bias = (torch.randn(shape[-1], generator=generator).to(device) for _ in range(2))
        yield x, weight if affine else None, bias if affine else None, 1e-5


layer_norm = Op(_layer_norm, cases=_cases, implementations={"triton": "shoal.kernels.triton.layer_norm:layer_norm"})
