"""rms_norm: root-mean-square normalization, with an optional residual added first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight * s / rms(s), s) with s = x + residual, or x; over the last dimension, the mean in float32.

    x and residual [..., size], weight [size]; both results have x's shape and dtype.
    """
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), x


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, with_residual in (((1, 8), False), ((7, 33), True), ((3, 5, 16), False), ((0, 4), True)):
        x, residual = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        weight = torch.randn(shape[-1], generator=generator).to(device)
        yield x, weight, 1e-5, residual if with_residual else None


rms_norm = Op(_rms_norm, cases=_cases, implementations={"triton": "shoal.kernels.triton.rms_norm:rms_norm"})
