"""The gang: the ranks of one replica, from their placement to the step channel, made anew as often as needed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from shoal.driver.config import EngineConfig, cpu_kvcache_bytes
from shoal.driver.draft import SchedulerLimits
from shoal.driver.model_config import resolve_dtype
from shoal.driver.replica import Place
from shoal.driver.resolve import (
    CPU_DECODE_BURST,
    CPU_STEP_TIMEOUT_S,
    GPU_DECODE_BURST,
    GPU_STEP_TIMEOUT_S,
    ResolvedConfig,
    check_model_len,
    count_blocks,
    pick_device,
    plans_in_flight,
    resolve_budgets,
    scarcest,
)
from shoal.driver.watchdog import Watchdog
from shoal.driver.worker_group import StepChannel, WorkerGroup
from shoal.workers.config import LoadConfig, WorkerConfig
from shoal.workers.plan import EPOCH_SHIFT

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.workers.models.spec import ModelSpec

FIRST_STEPS_FACTOR = 4  # kernels are compiled in the first steps


class Gang:
    """The ranks and what they were given. One thread at a time uses it."""

    def __init__(
        self, config: EngineConfig, processors: list[Any], env: dict[str, str], on_death: Callable[[int, str], None]
    ) -> None:
        """`on_death(epoch, reason)` is called on another thread when ranks of an epoch have died or hang."""
        self._config, self._env, self._on_death = config, env, on_death
        self._processors = processors[0]  # reference to the classes, which only the ranks unpack
        self._has_processors = bool(processors[1])
        self._spec: ModelSpec
        self._load: LoadConfig
        self._watchdog: Watchdog | None = None
        self.epoch = -1  # number of the ranks' present life; upper half of their step ids
        self.placed = False
        self._num_sharing = 1  # engines on this node
        self.one_of_many = False  # engines: others can do what this one cannot
        self.asleep: set[str] = set()  # "weights", "kv_cache"
        self._sleep_level = 0
        self.group: WorkerGroup
        self.channel: StepChannel
        self.resolved: ResolvedConfig

    @property
    def first_step(self) -> int:
        """Id of this epoch's first step."""
        return self.epoch << EPOCH_SHIFT

    @property
    def verdict(self) -> str | None:
        """What the watchdog found the ranks to have died of."""
        return None if self._watchdog is None else self._watchdog.verdict

    def place(self, place: Place) -> None:
        """Get the ranks their places and their processes started; the model need not be known."""
        self._num_sharing, self.one_of_many = place.num_sharing, place.one_of_many
        self._place(pick_device(self._config, ray.cluster_resources()), place.node_id)

    def _place(self, device: str, node_id: str | None) -> None:
        self.epoch += 1
        self.group = WorkerGroup(self._config, device, self._env, node_id)
        self.placed = True

    def load(self, spec: ModelSpec, load: LoadConfig) -> ResolvedConfig:
        """Load the weights, size the cache and open the channel, once placed."""
        config = self._config
        self._spec, self._load = spec, load
        spec.check_tensor_parallel(config.tensor_parallel_size)
        spec.check_pipeline_parallel(config.pipeline_parallel_size)
        dtype = resolve_dtype(config.dtype, spec, self.group.device, load.load_format == "gguf")
        self.resolved = self._set_up(dtype, check_model_len(config, spec), None)
        return self.resolved

    def rebuild(self) -> ResolvedConfig:
        """Discard what is left of the ranks and make new ones, with the same numbers."""
        old = self.resolved
        self.discard()
        self._place(old.device, None)  # wherever there is room now
        self.resolved = self._set_up(old.dtype, old.max_model_len, old.num_blocks)
        if self.asleep:
            awake = {"weights", "kv_cache"} - self.asleep
            self.sleep(self._sleep_level)
            self.wake_up(awake)
        return self.resolved

    def sleep(self, level: int) -> None:
        """Give KV and weights back (ModelRunner.sleep)."""
        self.group.run("sleep", level)
        self.asleep, self._sleep_level = {"weights", "kv_cache"}, level

    def wake_up(self, tags: set[str]) -> None:
        """Bring back what `sleep` gave away."""
        if tags:
            self.group.run("wake_up", tuple(sorted(tags)))
            self.asleep -= tags

    def discard(self) -> None:
        """End the ranks without asking them."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self.placed:
            self.placed = False
            self.group.discard()

    def shutdown(self) -> None:
        """End the ranks, who may leave their process group in order, and give their resources back."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self.placed:
            self.placed = False
            self.group.shutdown()

    def limits(self) -> SchedulerLimits:
        """What the scheduler works within."""
        config, resolved = self._config, self.resolved
        return SchedulerLimits(
            resolved.max_model_len,
            resolved.max_num_seqs,
            resolved.max_num_batched_tokens,
            resolved.num_blocks,
            resolved.block_size,
            resolved.decode_burst,
            config.long_prefill_token_threshold,
            config.enable_prefix_caching,
            config.enable_chunked_prefill,
            config.scheduling_policy == "priority",
            resolved.pipeline_parallel_size,
        )

    def _set_up(self, dtype: str, max_model_len: int, most_blocks: int | None) -> ResolvedConfig:
        config, group, device = self._config, self.group, self.group.device
        rows, tokens = resolve_budgets(config, max_model_len, group.probes)
        users = group.world_size * self._num_sharing
        threads = max(1, group.probes[0]["num_cpus"] // users) if device == "cpu" else None
        worker = WorkerConfig(
            self._spec,
            self._load,
            0,
            group.world_size,
            device,
            dtype,
            config.block_size,
            max_model_len,
            rows,
            tokens,
            config.enforce_eager,
            threads,
            group.num_stages,
            config.disable_custom_all_reduce,
        )
        # Longer than the watchdog waits for any step: it is to speak first, with the stacks of all ranks.
        limit_s = config.step_timeout_s or (CPU_STEP_TIMEOUT_S if device == "cpu" else GPU_STEP_TIMEOUT_S)
        group_timeout_s = max(600.0, 2 * FIRST_STEPS_FACTOR * limit_s)
        reports = group.setup(
            [replace(worker, rank=r) for r in range(group.world_size)], self._processors, group_timeout_s
        )
        if config.kv_cache_memory_bytes is not None or device == "cpu":
            frees = [config.kv_cache_memory_bytes or cpu_kvcache_bytes()] * group.world_size
        else:
            frees = group.run("free_kv_bytes", config.gpu_memory_utilization)
        free, block_bytes = scarcest(frees, [report["block_bytes"] for report in reports])
        num_blocks, max_model_len = count_blocks(config, free, block_bytes, max_model_len)
        num_blocks = min(num_blocks, most_blocks or num_blocks)
        group.run("allocate_kv", num_blocks)
        if device == "cuda":
            group.run("try_steps")
        self._watchdog = Watchdog(group, self.epoch, limit_s, FIRST_STEPS_FACTOR * limit_s, self._on_death)
        self.channel = self._watchdog.channel(group.open_channel(config.step_channel))
        burst = CPU_DECODE_BURST if device == "cpu" else GPU_DECODE_BURST
        burst = config.decode_burst or (burst if group.num_stages == 1 else 1)
        steady = self._has_processors  # custom processors see every token before the next is planned
        return ResolvedConfig(
            self._load.model, self._spec.architecture, device, dtype, group.stage_size, max_model_len, rows, tokens,
            config.block_size, num_blocks, num_blocks * block_bytes, reports[0]["weight_bytes"],
            max(report["load_s"] for report in reports), 1 if steady else burst,
            plans_in_flight(config, steady), group.num_stages,
        )  # fmt: skip
