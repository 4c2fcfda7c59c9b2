"""What a load format yields and what the models consume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class TensorSource(Protocol):
    """One tensor of a checkpoint, not read yet. Names follow the Hugging Face checkpoint of the architecture."""

    name: str
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """The whole tensor, on the CPU, in the checkpoint's dtype (dequantized formats: float32)."""
        ...

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Only `length` entries from `start` along `dim`; reads as little of the file as the format allows."""
        ...
