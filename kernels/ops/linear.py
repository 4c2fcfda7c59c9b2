"""linear: a dense layer's matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from shoal.kernels.op import Op


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias: [..., size], [outputs, size], [outputs] -> [..., outputs]."""
    return functional.linear(x, weight, bias)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, size, outputs, with_bias in (
        (1, 8, 5, True), (7, 136, 33, False), (70, 64, 150, True), (0, 4, 3, False), (127, 72, 40, False),
    ):  # fmt: skip
        x, weight, bias = (
            (torch.randn(shape, generator=generator) * scale).to(device)
            for shape, scale in (((rows, size), 1.0), ((outputs, size), size**-0.5), ((outputs,), 1.0))
        )
        yield x, weight, bias if with_bias else None


linear = Op(_linear, cases=_cases, implementations={"triton": "shoal.kernels.triton.linear:linear"})
