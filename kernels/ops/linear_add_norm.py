"""linear_add_norm: a layer that ends a block, the residual it is added to, and the norm that begins the next block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from shoal.kernels.op import Op
from shoal.kernels.ops.rms_norm import rms_norm


def _linear_add_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm of s, s) with s = x @ weight.T + residual.

    x [rows, size], weight [outputs, size], residual [rows, outputs], which may be overwritten; norm_weight [outputs].
    """
    return rms_norm.reference(functional.linear(x, weight), norm_weight, eps, residual)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, size, outputs in ((1, 8, 5), (7, 136, 33), (70, 300, 150), (0, 4, 3), (128, 72, 40), (200, 136, 24)):
        x, weight, residual, norm_weight = (
            (torch.randn(shape, generator=generator) * scale).to(device)
            for shape, scale in (
                ((rows, size), 1.0),
                ((outputs, size), size**-0.5),
                ((rows, outputs), 1.0),
                ((outputs,), 1.0),
            )
        )
        yield x, weight, residual, norm_weight, 1e-5


linear_add_norm = Op(
    _linear_add_norm, cases=_cases, implementations={"triton": "shoal.kernels.triton.linear:linear_add_norm"}
)
