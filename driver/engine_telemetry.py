"""An engine's metrics for Prometheus: read off the scheduler by a thread of their own, once a second."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from shoal.driver.telemetry import Publisher

if TYPE_CHECKING:
    from shoal.driver.metrics import EngineMetrics
    from shoal.driver.request import Request
    from shoal.driver.scheduler import Scheduler

EVERY_S = 1.0
_MOST_OBSERVED = 100  # values of each distribution a second: one costs some ten microseconds of the driver's process


class EngineTelemetry:
    """The step loop says when plans leave and results come; everything else is read, a moment old at worst."""

    def __init__(self, scheduler: Scheduler, metrics: EngineMetrics, tags: dict[str, str]) -> None:
        """Publishes nothing before `start`."""
        self._scheduler, self._metrics = scheduler, metrics
        self._publisher = Publisher(tags)
        self._sent: deque[float] = deque()
        self._received = 0.0
        self._steps: deque[float] = deque(maxlen=_MOST_OBSERVED)
        self._requests: deque[tuple[float, float]] = deque(maxlen=_MOST_OBSERVED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        """Begins to publish."""
        self._thread.start()

    def sent(self) -> None:
        """A plan went to the ranks."""
        self._sent.append(time.perf_counter())

    def received(self) -> None:
        """The oldest plan's results are here."""
        now = time.perf_counter()
        self._steps.append(now - max(self._sent.popleft(), self._received))
        self._received = now

    def lost(self) -> None:
        """No results will come of the plans that are with the ranks."""
        self._sent.clear()

    def finished(self, request: Request) -> None:
        """A request ended."""
        stats = request.stats
        if stats.first_token_ts:
            self._requests.append((stats.first_token_latency, stats.last_token_ts - stats.arrival_time))

    def close(self) -> None:
        """Publishes a last time and ends."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closing.wait(EVERY_S):
            self._publish()
        self._publish()

    def _publish(self) -> None:
        scheduler, publisher = self._scheduler, self._publisher
        stats, kv = scheduler.stats, scheduler.kv
        publisher.gauge("shoal_engine_running_requests", len(scheduler.running))
        publisher.gauge("shoal_engine_waiting_requests", scheduler.num_waiting)
        publisher.gauge("shoal_engine_kv_cache_usage", kv.pool.num_used / kv.pool.num_blocks)
        publisher.total("shoal_engine_prompt_tokens", stats.num_prompt_tokens)
        publisher.total("shoal_engine_generated_tokens", stats.num_generation_tokens)
        publisher.total("shoal_engine_wasted_tokens", stats.num_wasted_tokens)
        publisher.total("shoal_engine_preemptions", stats.num_preemptions)
        publisher.total("shoal_engine_prefix_cache_queried_tokens", kv.num_queried_tokens)
        publisher.total("shoal_engine_prefix_cache_hit_tokens", kv.num_hit_tokens)
        publisher.total("shoal_engine_steps", stats.num_steps)
        for reason, count in self._metrics.finish_reasons().items():
            publisher.total("shoal_engine_finished_requests", count, finish_reason=reason)
        while self._steps:
            publisher.observe("shoal_engine_step_seconds", self._steps.popleft())
        while self._requests:
            first_token, whole = self._requests.popleft()
            publisher.observe("shoal_engine_first_token_seconds", first_token)
            publisher.observe("shoal_engine_request_seconds", whole)
