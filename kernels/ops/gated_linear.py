"""gated_linear: both input projections of a gated MLP and what joins them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from shoal.kernels.op import Op
from shoal.kernels.ops.activation_and_mul import activation_and_mul


def _gated_linear(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    """activation(x @ gate.T) * (x @ up.T): [rows, size], [2 * outputs, size] (gate, then up) -> [rows, outputs]."""
    return activation_and_mul.reference(functional.linear(x, weight), name)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, size, outputs, name in (
        (1, 8, 5, "silu"), (7, 136, 33, "gelu_new"), (70, 64, 150, "silu"), (0, 4, 3, "relu"),
        (127, 72, 40, "silu"),
    ):  # fmt: skip
        x, weight = (
            (torch.randn(shape, generator=generator) * scale).to(device)
            for shape, scale in (((rows, size), 1.0), ((2 * outputs, size), size**-0.5))
        )
        yield x, weight, name


gated_linear = Op(_gated_linear, cases=_cases, implementations={"triton": "shoal.kernels.triton.linear:gated_linear"})
