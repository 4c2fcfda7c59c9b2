"""From what the user said and what the ranks report to the numbers the engine runs with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.driver.config import GIB, EngineConfig

if TYPE_CHECKING:
    from shoal.workers.models.spec import ModelSpec

MAX_BLOCKS = 1 << 18  # of a cache nobody sized by hand: a tiny model's default cache would be millions of blocks
LARGE_GPU_BYTES = 70 * GIB
CPU_DECODE_BURST, GPU_DECODE_BURST = 4, 8
CPU_STEP_TIMEOUT_S, GPU_STEP_TIMEOUT_S = 3600.0, 300.0


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The engine's numbers, after the ranks reported device and memory."""

    model: str
    architecture: str
    device: str
    dtype: str
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int  # of each rank
    weight_bytes: int  # of rank 0
    load_s: float
    decode_burst: int
    lookahead: int  # plans in flight, less one
    pipeline_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of this replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens the KV cache holds."""
        return self.num_blocks * self.block_size

    def __str__(self) -> str:
        concurrency = self.kv_cache_tokens / self.max_model_len
        return (
            f"{self.architecture} {self.dtype} on {self.world_size} {self.device} rank(s)"
            f"{f' in {self.pipeline_parallel_size} stages' if self.pipeline_parallel_size > 1 else ''}; "
            f"weights {self.weight_bytes / GIB:.2f} GiB a rank, loaded in {self.load_s:.1f} s; "
            f"KV cache size: {self.kv_cache_tokens:,} tokens ({self.kv_cache_bytes / GIB:.2f} GiB a rank); "
            f"maximum concurrency for {self.max_model_len:,} tokens per request: {concurrency:.2f}x; "
            f"max_num_seqs {self.max_num_seqs}, max_num_batched_tokens {self.max_num_batched_tokens}"
        )


def check_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    """The longest sequence to prepare for; ValueError where the user asks for more than the model can do."""
    derived = spec.max_position_embeddings
    asked = config.max_model_len
    if asked is None or asked == -1:
        return derived
    if asked > derived and os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
        raise ValueError(
            f"User-specified max_model_len ({asked}) is greater than the derived max_model_len ({derived}, from the "
            "model's config). To allow overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."
        )
    return asked


def pick_device(config: EngineConfig, resources: dict[str, float]) -> str:
    """cpu or cuda; ValueError when GPUs are asked for and the cluster has too few."""
    gpus = int(resources.get("GPU", 0))
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
        return "cpu"
    tensor, stages = config.tensor_parallel_size, config.pipeline_parallel_size
    if gpus < tensor * stages and not (config.wait_for_nodes and config.device == "cuda"):
        asked = f"tensor_parallel_size={tensor}" + (f", pipeline_parallel_size={stages}" if stages > 1 else "")
        raise ValueError(
            f"{asked} needs {tensor * stages} GPU(s); the Ray cluster has {gpus}. "
            'Lower it, join a larger cluster (address), or use device="cpu".'
        )
    return "cuda"


def resolve_budgets(config: EngineConfig, max_model_len: int, probes: list[dict[str, Any]]) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens)."""
    memory = min((probe.get("total", 0) for probe in probes), default=0)
    rows_default, tokens_default = (1024, 16384) if memory >= LARGE_GPU_BYTES else (256, 8192 if memory else 2048)
    rows = config.max_num_seqs or min(rows_default, config.max_num_batched_tokens or rows_default)
    tokens = config.max_num_batched_tokens
    if tokens is None:
        tokens = max(tokens_default, rows)
        if not config.enable_chunked_prefill:
            tokens = max(tokens, max_model_len)
    elif not config.enable_chunked_prefill and tokens < max_model_len:
        raise ValueError(
            f"max_num_batched_tokens ({tokens}) is smaller than max_model_len ({max_model_len}) and "
            "enable_chunked_prefill is off: a prompt must fit one step. Increase max_num_batched_tokens or decrease "
            "max_model_len."
        )
    return rows, min(tokens, rows * max_model_len)


def scarcest(free_bytes: list[int], block_bytes: list[int]) -> tuple[int, int]:
    """(free bytes, bytes of a block) of the rank that has room for the fewest blocks: every rank gets as many."""
    return min(zip(free_bytes, block_bytes, strict=True), key=lambda pair: pair[0] // pair[1])


def plans_in_flight(config: EngineConfig, steady: bool) -> int:
    """Plans that may be in flight at once, less one. `steady`: each must see the tokens of the one before."""
    if steady or not config.async_scheduling or not config.lookahead:
        return 0
    return config.lookahead + config.pipeline_parallel_size - 1


def count_blocks(config: EngineConfig, free_bytes: int, block_bytes: int, max_model_len: int) -> tuple[int, int]:
    """(num_blocks, max_model_len). ValueError if one sequence of max_model_len tokens does not fit."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override, max_model_len
    num_blocks = free_bytes // block_bytes
    if config.kv_cache_memory_bytes is None:
        num_blocks = min(num_blocks, MAX_BLOCKS)
    tokens = num_blocks * config.block_size
    if num_blocks < 1:
        raise ValueError(
            f"No available memory for the cache blocks: {free_bytes / GIB:.3f} GiB are left for the KV cache and one "
            f"block takes {block_bytes / GIB:.6f} GiB. {_KNOBS}"
        )
    if config.max_model_len == -1:
        return num_blocks, min(max_model_len, tokens)
    if tokens < max_model_len:
        needed = -(-max_model_len // config.block_size) * block_bytes
        raise ValueError(
            f"To serve at least one request with the model's max seq len ({max_model_len}), {needed / GIB:.3f} GiB KV "
            f"cache is needed, which is larger than the available KV cache memory ({free_bytes / GIB:.3f} GiB). Based "
            f"on the available memory, the estimated maximum model length is {tokens}. {_KNOBS}"
        )
    return num_blocks, max_model_len


_KNOBS = (
    "Decrease max_model_len, or give the cache more: gpu_memory_utilization (GPU), VLLM_CPU_KVCACHE_SPACE in GiB "
    "(CPU), kv_cache_memory_bytes, tensor_parallel_size."
)
