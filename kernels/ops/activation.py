"""activation: elementwise activations by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from shoal.kernels.op import Op


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


# gelu_new, gelu_fast and gelu_pytorch_tanh are one formula, written three ways.
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def _activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation of that name, elementwise. ValueError for an unknown name."""
    if name not in _FUNCTIONS:
        raise ValueError(f"unknown activation {name!r}, known: {', '.join(_FUNCTIONS)}")
    return _FUNCTIONS[name](x)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for name in _FUNCTIONS:
        yield torch.randn(3, 17, generator=generator).to(device) * 4, name


activation = Op(_activation, cases=_cases, implementations={"triton": "shoal.kernels.triton.activation:activation"})
