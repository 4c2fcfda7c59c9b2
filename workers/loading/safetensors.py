"""safetensors: one file, or shards with an index."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.workers.loading.base import Loader
from shoal.workers.loading.files import find_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from shoal.workers.config import LoadConfig
    from shoal.workers.loading.base import TensorSource

# Pages of a mapped file stay in the process's resident set as long as the mapping lives. A new mapping now and then
# keeps what loading shows as memory near the size of what is being read; opening costs one parse of the header.
REMAP_BYTES = 64 << 20


class SafetensorsFile:
    """One open file; reopened after each REMAP_BYTES read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._read = 0

    def open(self) -> Any:
        """The reader. ValueError naming the file and the reason when it is corrupt or cut short."""
        import safetensors

        if self._file is None or self._read >= REMAP_BYTES:
            self._read = 0
            try:
                self._file = safetensors.safe_open(str(self.path), framework="pt", device="cpu")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"cannot read {self.path}: {error}; the file is corrupt or incomplete") from error
        return self._file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor."""
        reader = self.open()
        return {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118 (no mapping)

    def count(self, tensor: torch.Tensor, touched: int) -> torch.Tensor:
        """The tensor; `touched` entries of its file are counted as read."""
        self._read += touched * tensor.element_size()
        return tensor


@dataclass(slots=True)
class SafetensorsSource:
    """One tensor of a safetensors file. What it returns may be a view of the mapped file: copy, do not keep."""

    name: str
    shape: tuple[int, ...]
    file: SafetensorsFile

    def load(self) -> torch.Tensor:
        """The whole tensor, in the file's dtype."""
        return self.file.count(self.file.open().get_tensor(self.name), math.prod(self.shape))

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries [start, start + length) along `dim`; only they are read."""
        assert 0 <= start <= start + length <= self.shape[dim], (self.name, self.shape, dim, start, length)
        where = (slice(None),) * (dim % len(self.shape)) + (slice(start, start + length),)
        part = self.file.open().get_slice(self.name)[where]
        # A slice of each row touches the pages of all rows.
        return self.file.count(part, part.numel() if dim == 0 else math.prod(self.shape))


class SafetensorsLoader(Loader):
    """*.safetensors in a local folder."""

    def sources(self, load: LoadConfig) -> Iterator[TensorSource]:
        found = find_weights(Path(load.model), "safetensors")
        for path in found.paths:
            file = SafetensorsFile(path)
            shapes = file.shapes()
            if found.weight_map is not None:
                wanted = [name for name, at in found.weight_map.items() if at == path.name]
                absent = [name for name in wanted if name not in shapes]
                if absent:
                    raise ValueError(f"{path} lacks {absent[0]!r}, which {found.index} says it holds")
                shapes = {name: shapes[name] for name in wanted}
            for name, shape in shapes.items():
                yield SafetensorsSource(name, shape, file)
