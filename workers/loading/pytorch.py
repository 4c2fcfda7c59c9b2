"""PyTorch's own files (.bin, .pt), read without ever running code from them."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from shoal.workers.loading.base import Loader
from shoal.workers.loading.files import find_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from shoal.workers.config import LoadConfig
    from shoal.workers.loading.base import TensorSource

REMAP_BYTES = 64 << 20  # as in safetensors.py: a fresh mapping drops the pages already read


class PytorchFile:
    """One file's state dict: mapped, and mapped anew after each REMAP_BYTES read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The format before torch 1.6 is no zip archive and cannot be mapped: it is read whole, once.
        self.mapped = zipfile.is_zipfile(path)
        self._tensors: dict[str, torch.Tensor] | None = None
        self._read = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """name -> tensor. ValueError naming the file when it is corrupt, holds code, or is no state dict."""
        if self._tensors is None or (self.mapped and self._read >= REMAP_BYTES):
            self._tensors, self._read = None, 0
            self._tensors = self._load()
        return self._tensors

    def count(self, tensor: torch.Tensor, touched: int) -> torch.Tensor:
        """The tensor; `touched` entries of its file are counted as read."""
        self._read += touched * tensor.element_size()
        return tensor

    def _load(self) -> dict[str, torch.Tensor]:
        import torch

        try:
            data = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except UnpicklingError as error:
            raise ValueError(
                f"{self.path} is refused: it holds something other than tensors, and loading it could run code "
                f"(or it is corrupt). Convert it to safetensors. Reason: {_first_line(error)}"
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"cannot read {self.path}: {_first_line(error)}; corrupt or incomplete") from error
        if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
            data = data["state_dict"]
        if not isinstance(data, dict) or not any(isinstance(value, torch.Tensor) for value in data.values()):
            raise ValueError(f"{self.path} holds no state dict: a {type(data).__name__} without tensors")
        return {name: value for name, value in data.items() if isinstance(value, torch.Tensor)}


@dataclass(slots=True)
class PytorchSource:
    """One tensor of a state dict. What it returns may be a view of the mapped file: copy, do not keep."""

    name: str
    shape: tuple[int, ...]
    file: PytorchFile

    def load(self) -> torch.Tensor:
        """The whole tensor, in the file's dtype."""
        return self.file.count(self.file.tensors()[self.name], math.prod(self.shape))

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries [start, start + length) along `dim`; only they are read when the file is mapped."""
        part = self.file.tensors()[self.name].narrow(dim, start, length)
        # A slice of each row touches the pages of all rows.
        return self.file.count(part, part.numel() if dim == 0 else math.prod(self.shape))


class PytorchLoader(Loader):
    """pytorch_model.bin, its shards, or other *.bin / *.pt state dicts in a local folder."""

    def sources(self, load: LoadConfig) -> Iterator[TensorSource]:
        found = find_weights(Path(load.model), "pt")
        for path in found.paths:
            file = PytorchFile(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors().items()}
            if found.weight_map is not None:
                wanted = [name for name, at in found.weight_map.items() if at == path.name]
                absent = [name for name in wanted if name not in shapes]
                if absent:
                    raise ValueError(f"{path} lacks {absent[0]!r}, which {found.index} says it holds")
                shapes = {name: shapes[name] for name in wanted}
            for name, shape in shapes.items():
                yield PytorchSource(name, shape, file)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
