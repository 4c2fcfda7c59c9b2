"""Counts and distributions of a run, under the field's metric names with the prefix "shoal:"."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.driver.request import Request
from shoal.driver.scheduler import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


@dataclass(frozen=True, slots=True)
class Counter:
    """A total since the engine's start."""

    name: str
    value: int
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gauge:
    """A value of this moment."""

    name: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Histogram:
    """A distribution: `buckets` maps an upper bound to how many values do not exceed it ("+Inf": all)."""

    name: str
    count: int
    sum: float
    buckets: dict[str, int]
    labels: dict[str, str] = field(default_factory=dict)


Metric = Counter | Gauge | Histogram


def add_up(by_replica: Mapping[str, Sequence[Metric]], deaths: int) -> list[Metric]:
    """Sums over engines (of shares, the mean), then what each engine says of itself, with the label "replica"."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Metric]] = {}
    for metrics in by_replica.values():
        for metric in metrics:
            groups.setdefault((metric.name, tuple(sorted(metric.labels.items()))), []).append(metric)
    total: list[Metric] = [Gauge("shoal:num_replicas", len(by_replica)), Counter("shoal:replica_deaths", deaths)]
    total += map(_sum, groups.values())
    return total + [
        replace(metric, labels=metric.labels | {"replica": number})
        for number, metrics in by_replica.items()
        for metric in metrics
    ]


def _sum(metrics: Sequence[Metric]) -> Metric:
    """One metric of several engines as one."""
    first = metrics[0]
    if isinstance(first, Histogram):
        parts = [metric for metric in metrics if isinstance(metric, Histogram)]
        buckets = {bound: sum(part.buckets[bound] for part in parts) for bound in first.buckets}
        return replace(first, count=sum(p.count for p in parts), sum=sum(p.sum for p in parts), buckets=buckets)
    if isinstance(first, Gauge):
        value = sum(metric.value for metric in metrics if isinstance(metric, Gauge))
        return replace(first, value=value / len(metrics) if first.name.endswith("_perc") else value)
    return replace(first, value=sum(metric.value for metric in metrics if isinstance(metric, Counter)))


class _Distribution:
    def __init__(self, name: str, bounds: tuple[float, ...]) -> None:
        self.name, self.bounds = name, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def read(self) -> Histogram:
        buckets, total = {}, 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            buckets[bound] = total
        return Histogram(self.name, total, self.sum, buckets)


class EngineMetrics:
    """What finished requests looked like; the rest is read off the scheduler."""

    def __init__(self) -> None:
        self._reasons: Tally[str] = Tally()
        self._prompt = _Distribution("shoal:request_prompt_tokens", _TOKENS)
        self._generation = _Distribution("shoal:request_generation_tokens", _TOKENS)
        self._latency = _Distribution("shoal:e2e_request_latency_seconds", _SECONDS)
        self._first_token = _Distribution("shoal:time_to_first_token_seconds", _SECONDS)
        self._queue = _Distribution("shoal:request_queue_time_seconds", _SECONDS)

    def finished(self, request: Request) -> None:
        """Count a request that ended."""
        stats = request.stats
        self._reasons[request.finish_reason or ""] += 1
        if not stats.first_token_ts:
            return
        self._prompt.add(request.num_prompt_tokens)
        self._generation.add(stats.num_generation_tokens)
        self._latency.add(stats.last_token_ts - stats.arrival_time)
        self._first_token.add(stats.first_token_latency)
        self._queue.add(stats.scheduled_ts - stats.arrival_time)

    def finish_reasons(self) -> dict[str, int]:
        """How many requests ended in each way."""
        return dict(self._reasons)

    def read(self, scheduler: Scheduler, num_restarts: int = 0) -> list[Metric]:
        """Everything, as of now."""
        stats, kv = scheduler.stats, scheduler.kv
        metrics: list[Metric] = [
            Gauge("shoal:num_requests_running", len(scheduler.running)),
            Gauge("shoal:num_requests_waiting", scheduler.num_waiting),
            Gauge("shoal:max_unfinished_requests", stats.max_unfinished),
            Gauge("shoal:kv_cache_usage_perc", kv.pool.num_used / kv.pool.num_blocks),
            Counter("shoal:prefix_cache_queries", kv.num_queried_tokens),
            Counter("shoal:prefix_cache_hits", kv.num_hit_tokens),
            Counter("shoal:num_preemptions", stats.num_preemptions),
            Counter("shoal:prompt_tokens", stats.num_prompt_tokens),
            Counter("shoal:prompt_tokens_cached", stats.num_cached_prompt_tokens),
            Counter("shoal:generation_tokens", stats.num_generation_tokens),
            Counter("shoal:wasted_tokens", stats.num_wasted_tokens),
            Counter("shoal:engine_restarts", num_restarts),
            Counter("shoal:engine_steps", stats.num_steps),
            Counter("shoal:engine_row_steps", stats.num_row_steps),
        ]
        for reason, count in sorted(self._reasons.items()):
            metrics.append(Counter("shoal:request_success", count, {"finished_reason": reason}))
        parts = (self._prompt, self._generation, self._latency, self._first_token, self._queue)
        return metrics + [part.read() for part in parts]
