"""Rotary embeddings: the frequencies of each rope type, and cos and sin of every position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from shoal.workers.models.spec import RopeSpec


class RotaryEmbedding(torch.nn.Module):
    """The table of cosines and sines that all layers share."""

    cos_sin: torch.Tensor  # float32 [num_positions, head_dim]: a position's cosines, then its sines

    def __init__(self, rope: RopeSpec, head_dim: int, num_positions: int) -> None:
        super().__init__()
        inv_freq = inverse_frequencies(rope, head_dim)
        angles = torch.arange(num_positions, dtype=torch.float32, device="cpu").unsqueeze(1) * inv_freq
        table = torch.cat([angles.cos(), angles.sin()], dim=1) * rope.attention_factor
        self.register_buffer("cos_sin", table.to(torch.get_default_device()), persistent=False)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions: float32 [head_dim / 2], on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq)
    if rope.rope_type == "yarn":
        return _yarn(rope, inv_freq, head_dim)
    assert rope.rope_type == "default", rope.rope_type
    return inv_freq


def _llama3(rope: RopeSpec, inv_freq: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended by their turns in the context."""
    turns = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(rope: RopeSpec, inv_freq: torch.Tensor, head_dim: int) -> torch.Tensor:
    """As llama3, but blended linearly in the dimension's index between two numbers of turns."""

    def dimension(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return inv_freq / rope.factor * stretch + inv_freq * (1 - stretch)
