"""What a rank is told at its start: plain data, torch-free, so that the driver can build it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.workers.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Where the weights are and how to read them."""

    model: str  # local folder, one .gguf file, or a hub id
    load_format: str = "auto"  # a key of LOADERS, or "auto"
    revision: str | None = None
    hf_token: str | None = None
    download_dir: str | None = None
    seed: int = 0  # of dummy weights

    def __repr__(self) -> str:  # the token must not reach a log
        return f"LoadConfig(model={self.model!r}, load_format={self.load_format!r}, revision={self.revision!r})"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One rank's share of the engine."""

    spec: ModelSpec
    load: LoadConfig
    rank: int
    world_size: int
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32", "float16", "bfloat16"
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enforce_eager: bool = False
    num_threads: int | None = None  # CPU ranks: torch threads
    num_stages: int = 1  # pipeline stages; the ranks of one are consecutive
    disable_custom_all_reduce: bool = False  # sum through NCCL only
