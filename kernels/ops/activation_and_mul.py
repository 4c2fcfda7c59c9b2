"""activation_and_mul: the gate of a gated MLP, with any activation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op
from shoal.kernels.ops.activation import activation


def _activation_and_mul(gate_up: torch.Tensor, name: str) -> torch.Tensor:
    """activation(first half) * second half of the last dimension: [..., 2 * size] -> [..., size].

    ValueError for an unknown name.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return activation.reference(gate, name).mul_(up)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("gelu", (1, 2)), ("gelu_new", (5, 34)), ("relu", (3, 7, 4)), ("silu", (0, 8))):
        yield torch.randn(shape, generator=generator).to(device) * 4, name


activation_and_mul = Op(
    _activation_and_mul,
    cases=_cases,
    implementations={"triton": "shoal.kernels.triton.activation:activation_and_mul"},
)
