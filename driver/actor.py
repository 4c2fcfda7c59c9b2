"""Driver: the actor that owns the queue, the scheduler and the ranks. Its process never imports torch.

Scheduler and block pool belong to one plain thread, the step loop. Actor methods run on other threads and only put
things into its inbox and wait; their order of arrival means nothing, since the client numbers its requests.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from shoal.driver.config import EngineConfig, cpu_kvcache_bytes
from shoal.driver.draft import Plan, SchedulerLimits
from shoal.driver.log import LOGGER, set_up_logging
from shoal.driver.metrics import EngineMetrics, Metric
from shoal.driver.model_config import resolve_dtype
from shoal.driver.replica import Place
from shoal.driver.request import EngineRequest, FinishedRequest, Request, pack_results, unpack_results
from shoal.driver.resolve import (
    CPU_DECODE_BURST,
    GPU_DECODE_BURST,
    ResolvedConfig,
    check_model_len,
    count_blocks,
    pick_device,
    plans_in_flight,
    resolve_budgets,
    scarcest,
)
from shoal.driver.scheduler import Scheduler
from shoal.driver.stop_strings import StopStrings
from shoal.driver.worker_group import StepChannel, WorkerGroup
from shoal.workers.config import LoadConfig, WorkerConfig
from shoal.workers.models.spec import ModelSpec
from shoal.workers.plan import StepOutput, concat_logprobs

GROUP_TIMEOUT_S = 600.0  # of a collective: a peer that is silent this long counts as dead


class EngineDeadError(RuntimeError):
    """The engine met an error it cannot go on from; make a new one."""


@dataclass(slots=True)
class Collected:
    """What `collect` gives: finished requests, the mark to acknowledge them with, and how the engine stands."""

    finished: list[FinishedRequest] = field(default_factory=list)
    mark: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_made_tokens: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        counts = (self.mark, self.num_running, self.num_waiting, self.kv_cache_usage, self.num_made_tokens)
        return _unpack_collected, (pack_results(self.finished), *counts)


def _unpack_collected(rows: list[tuple[Any, ...]], *counts: Any) -> Collected:
    return Collected(unpack_results(rows), *counts)


@dataclass(slots=True)
class _Control:
    """Something the loop does between steps, with no plan in flight."""

    action: Callable[[], Any]
    future: Future[Any]
    when_idle: bool = False  # only once no request is left


class Driver:
    """One replica. Plain class: `RemoteDriver` is the actor."""

    def __init__(self, config: EngineConfig, processors: list[Any], env: dict[str, str]) -> None:
        self._config, self._env = config, env
        self._spec: ModelSpec
        self._load: LoadConfig
        self._processors = processors[0]  # reference to the classes, which only the ranks unpack
        self._has_processors = bool(processors[1])
        self._metrics = EngineMetrics()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._controls: deque[_Control] = deque()
        self._inflight: deque[Plan] = deque()
        self._outbox: list[FinishedRequest] = []
        self._acknowledged = 0  # finished requests that left the outbox
        self._news = threading.Condition()
        self._failure: str | None = None
        self._paused = False
        self._asleep: set[str] = set()  # "weights", "kv_cache"
        self._closing = False
        self._group: WorkerGroup
        self._placed, self._num_sharing = False, 1  # engines on its node
        self._stop_strings: StopStrings
        self._channel: StepChannel
        self._scheduler: Scheduler
        self._resolved: ResolvedConfig
        self._thread: threading.Thread | None = None

    # ---- start and stop ----------------------------------------------------------------------------------------

    def place(self, place: Place) -> None:
        """Get the ranks their places and their processes started; the model need not be known."""
        config, self._num_sharing = self._config, place.num_sharing
        device = pick_device(config, ray.cluster_resources())
        sizes = config.tensor_parallel_size, config.pipeline_parallel_size
        self._group = WorkerGroup(sizes, device, config.placement_timeout_s, self._env, place.node_id)
        self._placed = True

    def start(self, spec: ModelSpec, load: LoadConfig, tokenizer_json: str | None) -> ResolvedConfig:
        """Load the weights, size the cache and begin, once placed. Errors of the user's are ValueErrors."""
        config, device = self._config, self._group.device
        self._spec, self._load = spec, load
        self._stop_strings = StopStrings(tokenizer_json)
        spec.check_tensor_parallel(config.tensor_parallel_size)
        spec.check_pipeline_parallel(config.pipeline_parallel_size)
        dtype = resolve_dtype(config.dtype, spec, device, load.load_format == "gguf")
        self._resolved = resolved = self._set_up(device, dtype, check_model_len(config, spec))
        self._scheduler = Scheduler(self._limits(resolved), self._stop_strings.check)
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)
        self._thread.start()
        return resolved

    def _set_up(self, device: str, dtype: str, max_model_len: int) -> ResolvedConfig:
        config, group = self._config, self._group
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
        )
        reports = group.setup(
            [replace(worker, rank=r) for r in range(group.world_size)], self._processors, GROUP_TIMEOUT_S
        )
        if config.kv_cache_memory_bytes is not None or device == "cpu":
            frees = [config.kv_cache_memory_bytes or cpu_kvcache_bytes()] * group.world_size
        else:
            frees = group.run("free_kv_bytes", config.gpu_memory_utilization)
        free, block_bytes = scarcest(frees, [report["block_bytes"] for report in reports])
        num_blocks, max_model_len = count_blocks(config, free, block_bytes, max_model_len)
        group.run("allocate_kv", num_blocks)
        self._channel = group.open_channel(config.step_channel)
        burst = CPU_DECODE_BURST if device == "cpu" else GPU_DECODE_BURST
        burst = config.decode_burst or (burst if group.num_stages == 1 else 1)
        steady = self._has_processors  # custom processors see every token before the next is planned
        return ResolvedConfig(
            self._load.model, self._spec.architecture, device, dtype, group.stage_size, max_model_len, rows, tokens,
            config.block_size, num_blocks, num_blocks * block_bytes, reports[0]["weight_bytes"],
            max(report["load_s"] for report in reports), 1 if steady else burst,
            plans_in_flight(config, steady), group.num_stages,
        )  # fmt: skip

    def _limits(self, resolved: ResolvedConfig) -> SchedulerLimits:
        config = self._config
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

    def shutdown(self) -> None:
        """End the ranks and give their resources back; requests that run are lost."""
        self._closing = True
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join(timeout=30)
        if self._placed:
            self._group.shutdown()

    # ---- called by clients, on any thread ----------------------------------------------------------------------

    def submit(self, requests: list[EngineRequest]) -> None:
        """Queue requests."""
        self._check_alive()
        if self._asleep:
            raise RuntimeError("the engine sleeps: call wake_up() first")
        self._inbox.put(requests)

    def collect(self, mark: int, timeout: float) -> Collected:
        """Finished requests, as soon as there are any or after `timeout` seconds. They are kept until the caller gives
        their mark back, so an interrupted call takes nothing away from the next."""
        with self._news:
            del self._outbox[: max(0, mark - self._acknowledged)]
            self._acknowledged = max(mark, self._acknowledged)
            self._news.wait_for(lambda: self._outbox or self._failure, timeout)
            finished = list(self._outbox)
            mark = self._acknowledged + len(finished)
        if not finished:
            self._check_alive()
        scheduler = self._scheduler
        pool, running, waiting = scheduler.kv.pool, len(scheduler.running), scheduler.num_waiting
        return Collected(finished, mark, running, waiting, pool.num_used / pool.num_blocks, self.num_made_tokens())

    def num_made_tokens(self) -> int:
        """Tokens that were sampled since the start, those that were cut off again too. A dead engine still tells."""
        stats = self._scheduler.stats
        return stats.num_generation_tokens + stats.num_wasted_tokens

    def abort(self, numbers: list[int]) -> None:
        """End these requests; when this returns they are gone and none of them will be collected."""
        gone = set(numbers)

        def action() -> None:
            self._scheduler.abort(numbers)
            self._publish(self._scheduler.take_ended())
            with self._news:
                kept = [f for f in self._outbox if f.number not in gone]
                self._outbox, self._acknowledged = kept, self._acknowledged + len(self._outbox) - len(kept)

        self._control(action)

    def call_workers(self, payload: list[Any], timeout: float | None) -> list[Any]:
        """A call on every rank; `payload` holds a reference, and references come back: nothing is unpacked here."""
        return list(self._control(lambda: self._group.run_payload(payload[0], timeout)))

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget cached prefixes. False while blocks are held, unless running requests are to start over."""

        def action() -> bool:
            if reset_running_requests:
                self._scheduler.preempt_all()
            return self._scheduler.kv.reset()

        return bool(self._control(action))

    def sleep(self, level: int, mode: str) -> None:
        """Level 0: stop scheduling. 1 and 2: also give KV and weights back, once `mode` has dealt with requests."""
        if mode == "abort":
            self._control(lambda: self._scheduler.abort(self._scheduler.unfinished_numbers()))

        def action() -> None:
            self._paused = True
            if level == 0:
                return
            self._scheduler.preempt_all()
            self._scheduler.kv.reset()
            self._group.run("sleep", level)
            self._asleep = {"weights", "kv_cache"}

        self._control(action, when_idle=mode == "wait")

    def wake_up(self, tags: list[str] | None) -> None:
        """Bring back what `sleep` gave away; scheduling goes on once everything is there."""
        wanted = {"weights", "kv_cache", "scheduling"} if tags is None else set(tags)

        def action() -> None:
            back = wanted & self._asleep
            if back:
                self._group.run("wake_up", tuple(sorted(back)))
                self._asleep -= back
            if not self._asleep and (tags is None or "scheduling" in wanted or back):
                self._paused = False

        self._control(action)

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def metrics(self) -> list[Metric]:
        """Counts and distributions since the start."""
        return list(self._control(lambda: self._metrics.read(self._scheduler)))

    def _control(self, action: Callable[[], Any], when_idle: bool = False) -> Any:
        self._check_alive()
        control = _Control(action, Future(), when_idle)
        self._inbox.put(control)
        return control.future.result()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine is dead: {self._failure}")

    # ---- the step loop -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        set_up_logging()
        try:
            while not self._closing:
                self._step()
        except Exception as error:  # nothing may end this thread silently: every waiting caller must hear of it
            LOGGER.error("the step loop failed:\n%s", traceback.format_exc())
            self._fail(f"{type(error).__name__}: {error}")

    def _step(self) -> None:
        """Schedule → execute → update. Ranks execute while the next plans are made and older results are taken."""
        self._take_inbox()
        scheduler = self._scheduler
        while self._may_schedule() and (plan := scheduler.schedule()) is not None:
            self._channel.send(plan.output.step_id, plan.output.encode())
            self._inflight.append(plan)
        finished = scheduler.take_ended()
        if self._inflight:
            output = StepOutput.decode(self._channel.receive())
            finished += scheduler.update(self._inflight.popleft(), output)
        self._publish(finished)
        self._run_controls()

    def _may_schedule(self) -> bool:
        return len(self._inflight) <= self._resolved.lookahead and not self._paused and not self._controls_due()

    def _take_inbox(self) -> None:
        """Everything that has come in; waits when there is nothing else to do."""
        idle = not self._inflight and not self._controls_due() and (self._paused or not self._scheduler.num_unfinished)
        while idle or not self._inbox.empty():
            item = self._inbox.get()
            idle = False
            if isinstance(item, _Control):
                self._controls.append(item)
            elif item is not None:
                for request in item:
                    self._scheduler.add(request)

    def _controls_due(self) -> bool:
        return bool(self._controls) and not (self._controls[0].when_idle and self._scheduler.num_unfinished)

    def _run_controls(self) -> None:
        while self._controls_due() and not self._inflight:
            control = self._controls.popleft()
            try:
                control.future.set_result(control.action())
            except Exception as error:  # belongs to the caller
                control.future.set_exception(error)
            self._publish(self._scheduler.take_ended())

    def _publish(self, requests: list[Request]) -> None:
        if not requests:
            return
        results = []
        for request in requests:
            self._metrics.finished(request)
            self._stop_strings.forget(request)
            results.append(_finished(request))
        with self._news:
            self._outbox += results
            self._news.notify_all()

    def _fail(self, reason: str) -> None:
        with self._news:
            self._failure = reason
            self._news.notify_all()
        self._group.shutdown()
        waiting = list(self._controls)
        while not self._inbox.empty():
            item = self._inbox.get()
            waiting += [item] if isinstance(item, _Control) else []
        for control in waiting:
            control.future.set_exception(EngineDeadError(f"the engine is dead: {reason}"))


def _finished(request: Request) -> FinishedRequest:
    """What the client gets of a request."""
    failed = request.finish_reason == "error"
    prompt_parts = [request.prompt_logprobs[start] for start in sorted(request.prompt_logprobs)]
    return FinishedRequest(
        number=request.source.number,
        token_ids=request.token_ids[request.num_prompt_tokens :],
        finish_reason=request.finish_reason or "error",
        stop_reason=request.stop_reason,
        stop_text=None if failed else request.stop_text,
        error=request.stop_text if failed else None,
        num_cached_tokens=request.num_cached_tokens,
        logprobs=concat_logprobs(request.logprobs) if request.logprobs else None,
        prompt_logprobs=concat_logprobs(prompt_parts) if prompt_parts else None,
        metrics=request.stats,
    )


RemoteDriver = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=16)(Driver)
