"""What a load format yields and what the models consume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from shoal.workers.config import LoadConfig


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


class Loader(ABC):
    """One weight format. A row of LOADERS names a subclass; it is built without arguments."""

    @abstractmethod
    def sources(self, load: LoadConfig) -> Iterator[TensorSource]:
        """Every tensor of the checkpoint, in the order that reads the files once.

        Raises ValueError for a file that cannot be read (named, with the reason), RuntimeError when there is none.
        """

    def load(self, model: nn.Module, load: LoadConfig) -> None:
        """Hand the tensors to `model.load_weights`."""
        model.load_weights(self.sources(load))  # type: ignore[operator]  # nn.Module's attributes have no types
