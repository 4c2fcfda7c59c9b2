"""Activations by their name in a config."""

from __future__ import annotations

import torch

from shoal.kernels.ops.activation import activation
from shoal.kernels.ops.activation_and_mul import activation_and_mul


class Activation(torch.nn.Module):
    """One of ModelSpec's activations, elementwise."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return activation(x, self.name)


class GatedActivation(torch.nn.Module):
    """act(gate) * up, of the two halves of a fused projection's output."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[num_tokens, 2 * size] -> [num_tokens, size]."""
        return activation_and_mul(gate_up, self.name)
