"""What the scheduler works within and what it makes: limits, counts, and plans while they are drawn up."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shoal.driver.request import Request
from shoal.workers.plan import NewRow, SchedulerOutput


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Budgets of every step and of the cache."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    decode_burst: int = 1
    long_prefill_token_threshold: int = 0
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    use_priority: bool = False
    num_lanes: int = 1  # groups of rows that take turns, one a plan: as many as there are pipeline stages

    def refusal(self, num_tokens: int) -> str | None:
        """Why a prompt of so many tokens can never run, if that is so."""
        capacity = self.num_blocks * self.block_size
        if num_tokens <= capacity:
            return None
        return (
            f"The prompt ({num_tokens} tokens) cannot fit the KV cache of {capacity} tokens ({self.num_blocks} blocks "
            f"of {self.block_size}): the longest prompt that fits has {capacity} tokens. Enlarge it "
            "(gpu_memory_utilization, kv_cache_memory_bytes, VLLM_CPU_KVCACHE_SPACE, num_gpu_blocks_override)."
        )


@dataclass(slots=True)
class Plan:
    """A step on its way: what the ranks get, and whose rows they are."""

    output: SchedulerOutput
    requests: list[Request]

    def forget(self) -> None:
        """Its results will never come, nor those of other plans of its requests."""
        for request in self.requests:
            request.num_plans_inflight = request.num_inflight_tokens = 0


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start."""

    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_wasted_tokens: int = 0
    num_steps: int = 0
    num_row_steps: int = 0  # rows, summed over steps: over num_steps it is the mean batch
    num_scheduled_tokens: int = 0
    max_unfinished: int = 0


@dataclass(slots=True)
class Draft:
    """A plan being made."""

    requests: list[Request] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)  # row, index in its table, block

    def put(self, request: Request, count: int, samples: bool, steps: int) -> None:
        """Add a row, with the blocks its table got since the ranks last heard of it."""
        table = request.block_table
        granted = request.num_granted_blocks
        self.blocks += [(request.row, index, table[index]) for index in range(granted, len(table))]
        request.num_granted_blocks = len(table)
        self.requests.append(request)
        self.rows.append(request.row)
        self.counts.append(count)
        self.samples.append(samples)
        self.steps.append(steps)

    def seal(self, step_id: int) -> Plan:
        """The finished plan."""
        blocks = np.array(self.blocks, np.int32).reshape(-1, 3).T
        output = SchedulerOutput(
            step_id,
            np.array(self.rows, np.int32),
            np.array(self.counts, np.int32),
            np.array(self.samples, np.uint8),
            np.array(self.steps, np.int32),
            max(self.steps),
            self.new_rows,
            *blocks,
        )
        return Plan(output, self.requests)
