"""Runs a workload twice on an engine of its own and takes down what happened."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.driver.bench.floors import ITEM_BYTES, Ceilings, Floor, decode_kv_bytes, serial_floor
from shoal.driver.bench.workloads import BenchRequest
from shoal.driver.llm import LLM
from shoal.driver.params import SamplingParams

_COUNTERS = {  # of the engine's metrics, what a run reports
    "num_steps": "shoal:engine_steps",
    "num_row_steps": "shoal:engine_row_steps",
    "num_preemptions": "shoal:num_preemptions",
    "num_wasted_tokens": "shoal:wasted_tokens",
    "num_cached_prompt_tokens": "shoal:prompt_tokens_cached",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over the workload."""

    seconds: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    num_steps: int
    mean_batch: float
    num_preemptions: int
    num_wasted_tokens: int
    num_cached_prompt_tokens: int
    kv_read_gb_per_s: float  # KV bytes that the rows' decode steps read, over the whole run's time


def run_workload(llm: LLM, requests: Sequence[BenchRequest], temperature: float, show_bar: bool) -> Run:
    """One pass from an empty prefix cache. Every output's length is checked."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be reset: requests still hold blocks")
    prompts = [{"prompt_token_ids": request.prompt} for request in requests]
    params = [sampling(request.num_output, temperature) for request in requests]
    before = _counters(llm)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=show_bar)
    seconds = time.perf_counter() - start
    counts = {name: value - before[name] for name, value in _counters(llm).items()}
    check_lengths(requests, [len(output.outputs[0].token_ids) for output in outputs])
    num_input, num_output = sum(len(r.prompt) for r in requests), sum(r.num_output for r in requests)
    row_steps = counts.pop("num_row_steps")
    item_bytes = ITEM_BYTES[llm.resolved.dtype]
    return Run(
        seconds=seconds,
        output_tokens_per_s=num_output / seconds,
        total_tokens_per_s=(num_input + num_output) / seconds,
        requests_per_s=len(requests) / seconds,
        mean_batch=row_steps / counts["num_steps"],
        kv_read_gb_per_s=decode_kv_bytes(llm.model_config, requests, item_bytes) / seconds / 1e9,
        **counts,
    )


def sampling(num_output: int, temperature: float) -> SamplingParams:
    """Exactly so many tokens, and no text."""
    return SamplingParams(temperature=temperature, max_tokens=num_output, ignore_eos=True, detokenize=False)


def check_lengths(requests: Sequence[BenchRequest], lengths: Sequence[int]) -> None:
    """RuntimeError where an output has not the length that was asked for: its figures would mean nothing."""
    for index, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        if length != request.num_output:
            raise RuntimeError(f"request {index} has {length} output tokens, and not {request.num_output}")


def add_ceilings(rates: Sequence[dict[str, float]]) -> Ceilings:
    """Ranks work side by side. Attention is charged at the rate of matrix products."""
    read, product = (sum(rate[name] for rate in rates) for name in ("read_bytes_per_s", "matmul_flops_per_s"))
    return Ceilings(read, product, product)


def floor_of(llm: LLM, requests: Sequence[BenchRequest], rates: Sequence[dict[str, float]]) -> Floor:
    """The workload's floor with this engine's places and cache, on devices of these rates, one for each rank.

    Of replicas each has its share of the requests and reads its own weights: the floor is that of the slowest.
    """
    resolved, ranks = llm.resolved, llm.get_world_size(include_dp=False)
    num_replicas = len(rates) // ranks
    floors = [
        serial_floor(
            llm.model_config,
            add_ceilings(rates[i * ranks : (i + 1) * ranks]),
            requests[i::num_replicas],
            item_bytes=ITEM_BYTES[resolved.dtype],
            max_rows=resolved.max_num_seqs,
            kv_tokens=resolved.kv_cache_tokens,
        )
        for i in range(num_replicas)
    ]
    return max(floors, key=lambda floor: floor.seconds)


def _counters(llm: LLM) -> dict[str, int]:
    values: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics() if not metric.labels}
    return {name: int(values[metric].value) for name, metric in _COUNTERS.items()}
