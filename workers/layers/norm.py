"""RMSNorm and LayerNorm over the last dimension."""

from __future__ import annotations

import torch

from shoal.kernels.ops.layer_norm import layer_norm
from shoal.kernels.ops.rms_norm import rms_norm
from shoal.workers.layers.parameter import WeightParameter, load_replicated


class RMSNorm(torch.nn.Module):
    """weight * x / rms(x)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = WeightParameter((size,), load_replicated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape."""
        return rms_norm(x, self.weight, self.eps)[0]

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual)."""
        return rms_norm(x, self.weight, self.eps, residual)


class LayerNorm(torch.nn.Module):
    """Mean 0, variance 1, then weight and bias where `affine`."""

    def __init__(self, size: int, eps: float, *, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = WeightParameter((size,), load_replicated) if affine else None
        self.bias = WeightParameter((size,), load_replicated) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape."""
        return layer_norm(x, self.weight, self.bias, self.eps)
