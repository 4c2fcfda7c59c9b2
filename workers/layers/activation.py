"""Activations by their name in a config."""

from __future__ import annotations

import torch

from shoal.kernels.ops.activation import activation


class Activation(torch.nn.Module):
    """One of ModelSpec's activations, elementwise."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return activation(x, self.name)
