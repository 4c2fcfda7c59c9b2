"""Whether a job fits, and how long it takes at least, or as an earlier run goes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shoal.driver.bench.floors import (
    CARDS,
    ITEM_BYTES,
    Ceilings,
    kv_bytes_per_token,
    kv_room,
    serial_floor,
    weight_bytes,
)
from shoal.driver.bench.workloads import BenchRequest
from shoal.driver.config import EngineConfig, cpu_kvcache_bytes
from shoal.driver.jobs.plan.survey import Asked, Survey

if TYPE_CHECKING:
    from shoal.workers.models.spec import ModelSpec

_SAMPLE = 2000  # rows whose steps are played through
_LARGE_CARD = 70e9


def find_card(name: str) -> tuple[str, Ceilings, float]:
    """Name, rates and memory of a card. ValueError where it is not known."""
    found = CARDS.get(name.upper())
    if found is None:
        near = difflib.get_close_matches(name.upper(), CARDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--card {name}: known are {', '.join(CARDS)}{hint}")
    return name.upper(), *found


def memory(config: EngineConfig, spec: ModelSpec, dtype: str, card: float | None) -> dict[str, Any]:
    """KV cache of one engine in tokens, what it rests on, and the rows it holds at once. `card`: bytes of a card."""
    item, ranks = ITEM_BYTES[dtype], config.tensor_parallel_size * config.pipeline_parallel_size
    token = kv_bytes_per_token(spec, item)
    if config.num_gpu_blocks_override is not None:
        tokens, rests = config.num_gpu_blocks_override * config.block_size, "num_gpu_blocks_override"
    elif config.kv_cache_memory_bytes is not None:
        tokens, rests = config.kv_cache_memory_bytes * ranks // token, "kv_cache_memory_bytes"
    elif card is not None:
        tokens, rests = kv_room(spec, card * ranks, item), "what the card leaves beside the weights"
    else:
        tokens, rests = cpu_kvcache_bytes() * ranks // token, "a CPU's KV cache (SHOAL_CPU_KVCACHE_SPACE)"
    large = card is not None and card >= _LARGE_CARD
    return {
        "kv_bytes_per_token": token,
        "weight_bytes": weight_bytes(spec, item),
        "kv_tokens": tokens,
        "rests_on": rests,
        "max_num_seqs": config.max_num_seqs or (1024 if large else 256),
    }


def outputs(asked: Sequence[Asked], mean: float | None) -> list[int]:
    """Tokens that each row is taken to generate: its limit, or less so that they are `mean` on average."""
    limits = [one.output for one in asked]
    if mean is None:
        return limits
    average = sum(limits) / len(limits) if limits else 0.0
    share = min(1.0, mean / average) if average else 0.0
    return [max(1, round(limit * share)) for limit in limits]


def floor_seconds(
    found: Survey, made: Sequence[int], spec: ModelSpec, ceilings: Ceilings, fit: dict[str, Any], item_bytes: int,
    engines: int, ranks: int,
) -> float:  # fmt: skip
    """Seconds that the usable rows take at least, on `engines` engines of `ranks` cards each."""
    step = max(1, len(found.asked) // _SAMPLE)
    pairs = list(zip(found.asked, made, strict=True))[::step]
    if not pairs:
        return 0.0
    # What is shared is neither computed nor stored twice: as if prompts were that much shorter.
    requests = [BenchRequest([0] * (one.prompt - one.shared), output) for one, output in pairs]
    all_ranks = Ceilings(
        ceilings.read_bytes_per_s * ranks, ceilings.matmul_flops_per_s * ranks, ceilings.attention_flops_per_s * ranks
    )
    floor = serial_floor(
        spec, all_ranks, requests, item_bytes=item_bytes, max_rows=fit["max_num_seqs"], kv_tokens=fit["kv_tokens"]
    )
    return floor.seconds * found.num_usable / len(requests) / engines


def like_seconds(found: Survey, made: Sequence[int], report: dict[str, Any]) -> float:
    """Seconds at the rate of an earlier run, prompt tokens that were computed and generated tokens together."""
    tokens = report["tokens"]
    work = tokens["prompt"] - tokens["cached"] + tokens["committed"]
    seconds = report["time"]["answering_s"]
    if work <= 0 or seconds <= 0:
        raise ValueError("--like: that run answered no rows, so it has no rate")
    mine = sum(one.prompt - one.shared for one in found.asked) + sum(made)
    return float(mine * found.scale * seconds / work)
