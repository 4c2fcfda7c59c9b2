"""Weights of one .gguf file, dequantized to float32, under the names and layouts of Hugging Face checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shoal.workers.loading.base import Loader
from shoal.workers.loading.gguf_file import GgufFile, GgufTensor, read_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shoal.workers.config import LoadConfig
    from shoal.workers.loading.base import TensorSource

CHUNK_BYTES = 16 << 20  # of float32 per call of the dequantizer, which needs several times what it returns

_LLAMA_NAMES = (
    "model.embed_tokens",
    "model.norm",
    "lm_head",
    "model.layers.{}.input_layernorm",
    "model.layers.{}.self_attn.q_proj",
    "model.layers.{}.self_attn.k_proj",
    "model.layers.{}.self_attn.v_proj",
    "model.layers.{}.self_attn.o_proj",
    "model.layers.{}.self_attn.q_norm",
    "model.layers.{}.self_attn.k_norm",
    "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.mlp.gate_proj",
    "model.layers.{}.mlp.up_proj",
    "model.layers.{}.mlp.down_proj",
)
_GPT2_NAMES = (
    "transformer.wte",
    "transformer.wpe",
    "transformer.ln_f",
    "lm_head",
    "transformer.h.{}.ln_1",
    "transformer.h.{}.attn.c_attn",
    "transformer.h.{}.attn.c_proj",
    "transformer.h.{}.ln_2",
    "transformer.h.{}.mlp.c_fc",
    "transformer.h.{}.mlp.c_proj",
)


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """How llama.cpp writes one architecture: module names of the checkpoint, and what its converter changed."""

    names: tuple[str, ...]
    permuted: bool = False  # rows of q and k are interleaved for llama.cpp's rotary embedding
    transposed: tuple[str, ...] = ()  # endings of weights that the checkpoint keeps as [in, out] (Conv1D)
    skipped: tuple[str, ...] = ()  # tensors that the config, not the weights, stands for


LAYOUTS: dict[str, GgufLayout] = {
    "llama": GgufLayout(_LLAMA_NAMES, permuted=True, skipped=("rope_freqs.weight",)),
    "granite": GgufLayout(_LLAMA_NAMES, permuted=True, skipped=("rope_freqs.weight",)),
    "qwen3": GgufLayout(_LLAMA_NAMES),
    "gpt2": GgufLayout(_GPT2_NAMES, transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight")),
}
"""general.architecture -> layout."""


def layout_of(file: GgufFile) -> GgufLayout:
    """The row of LAYOUTS for this file; ValueError naming what is known."""
    layout = LAYOUTS.get(file.architecture)
    if layout is None:
        raise ValueError(
            f"{file.path}: GGUF architecture {file.architecture!r} is not supported, only {sorted(LAYOUTS)}"
        )
    return layout


class GgufLoader(Loader):
    """One .gguf file."""

    def sources(self, load: LoadConfig) -> Iterator[TensorSource]:
        file = read_gguf(load.model)
        layout = layout_of(file)
        names = _checkpoint_names(file, layout)
        for tensor in file.tensors.values():
            if tensor.name in layout.skipped:
                continue
            module, _, ending = tensor.name.rpartition(".")
            if module not in names:
                raise ValueError(f"{file.path}: no place in {file.architecture} is known for tensor {tensor.name!r}")
            name = f"{names[module]}.{ending}"
            heads = _permuted_heads(file, name) if layout.permuted else None
            yield GgufSource(name, file.path, tensor, heads, name.endswith(layout.transposed))


class GgufSource:
    """One tensor of a .gguf file. `shape` is the checkpoint's: [out, in], for Conv1D [in, out], or [n]."""

    def __init__(self, name: str, path: Path, tensor: GgufTensor, heads: int | None, transposed: bool) -> None:
        assert len(tensor.shape) <= 2, (name, tensor.shape)
        self.name = name
        self.path = path
        self.tensor = tensor
        self.heads = heads
        self.transposed = transposed and len(tensor.shape) == 2
        self.shape = tensor.shape[::-1] if self.transposed else tensor.shape

    def load(self) -> torch.Tensor:
        """The whole tensor, float32."""
        return self._read(0, self._rows, 0, self._columns)

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries [start, start + length) along `dim`, float32; only the blocks that hold them are dequantized."""
        assert 0 <= start <= start + length <= self.shape[dim], (self.name, self.shape, dim, start, length)
        dim %= len(self.shape)
        by_row = len(self.shape) == 2 and (dim == 0) != self.transposed
        if self.heads and len(self.shape) == 1:
            return self.load()[start : start + length].contiguous()
        if by_row:
            return self._read(start, length, 0, self._columns)
        return self._read(0, self._rows, start, length)

    @property
    def _rows(self) -> int:
        return self.tensor.shape[0] if len(self.tensor.shape) == 2 else 1

    @property
    def _columns(self) -> int:
        return self.tensor.shape[-1]

    def _read(self, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        """Rows and columns of the file's matrix, in the checkpoint's order and layout."""
        packed, block, block_bytes = self._packed()
        first, last = column // block, -(-(column + columns) // block)
        out = np.empty((rows, columns), np.float32)
        order = self._row_order()
        step = max(1, CHUNK_BYTES // (4 * (last - first) * block))
        for at in range(0, rows, step):
            end = min(at + step, rows)
            taken: Any = slice(row + at, row + end) if order is None else order[row + at : row + end]
            part = np.ascontiguousarray(packed[taken, first * block_bytes : last * block_bytes])
            cut = column - first * block
            out[at:end] = self._dequantize(part)[:, cut : cut + columns]
        if len(self.shape) == 1:
            vector = torch.from_numpy(out[0])
            return unpermute(vector, self.heads) if self.heads else vector
        matrix = torch.from_numpy(out)
        return matrix.t().contiguous() if self.transposed else matrix

    def _packed(self) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], int, int]:
        """The file's bytes [rows, bytes per row], mapped; entries and bytes of a block."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.tensor.type_id)]
        shape = (self._rows, self.tensor.num_bytes // self._rows)
        return np.memmap(self.path, np.uint8, "r", self.tensor.offset, shape), block, block_bytes

    def _dequantize(self, part: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType(self.tensor.type_id)
        try:
            values: np.ndarray[Any, np.dtype[np.float32]] = dequantize(part, kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor {self.tensor.name!r} is {kind.name}, which the gguf package cannot dequantize"
            ) from None
        return values

    def _row_order(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """The file's row for each row of the checkpoint; None when they are the same."""
        if not self.heads or len(self.shape) != 2:
            return None
        return unpermute(torch.arange(self._rows), self.heads).numpy()


def unpermute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of q and k rows [heads * head_dim, ...].

    Its converter pairs row i of a head's first half with row i of the second; a checkpoint has the halves in one piece.
    """
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def _permuted_heads(file: GgufFile, name: str) -> int | None:
    """How many heads a q or k projection has; None for all others."""
    heads = file.integer("attention.head_count")
    if ".q_proj." in name:
        return heads
    if ".k_proj." in name:
        return file.integer("attention.head_count_kv", heads)
    return None


def _checkpoint_names(file: GgufFile, layout: GgufLayout) -> dict[str, str]:
    """Module name in the file -> module name in the checkpoint."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    layers = file.integer("block_count")
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = get_tensor_name_map(arch, layers)
    names: dict[str, str] = {}
    for template in layout.names:
        for module in [template.format(i) for i in range(layers)] if "{}" in template else [template]:
            ours = table.get_name(module)
            if ours is not None:
                names[ours] = module
    return names
