"""Metrics for Prometheus, through Ray: what is published under which name. Ray puts `ray_` before each name and, for a
counter, `_total` after it; `docs/grafana/shoal.json` draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True, slots=True)
class About:
    """One metric."""

    kind: str  # counter, gauge or histogram
    description: str
    tags: tuple[str, ...] = ()  # beside those that all metrics of a publisher have
    boundaries: tuple[float, ...] = ()


# Of each engine, from its driver actor; tags model and engine.
ENGINE_METRICS = {
    "shoal_engine_running_requests": About("gauge", "sequences in the batch"),
    "shoal_engine_waiting_requests": About("gauge", "sequences in the engine's queue"),
    "shoal_engine_kv_cache_usage": About("gauge", "share of KV blocks in use, 0 to 1"),
    "shoal_engine_prompt_tokens": About("counter", "prompt tokens of requests that came in"),
    "shoal_engine_generated_tokens": About("counter", "tokens sampled and kept"),
    "shoal_engine_wasted_tokens": About("counter", "tokens sampled and cut off again"),
    "shoal_engine_preemptions": About("counter", "requests put back because the KV cache was full"),
    "shoal_engine_prefix_cache_queried_tokens": About("counter", "prompt tokens looked up in the prefix cache"),
    "shoal_engine_prefix_cache_hit_tokens": About("counter", "of those, tokens found there"),
    "shoal_engine_steps": About("counter", "steps computed"),
    "shoal_engine_finished_requests": About("counter", "requests that ended", ("finish_reason",)),
    "shoal_engine_step_seconds": About("histogram", "time of a step (at most 100 steps a second are counted)",
                                       boundaries=_STEP_SECONDS),
    "shoal_engine_first_token_seconds": About("histogram", "from a request's arrival to its first token (at most 100 "
                                              "requests a second are counted)", boundaries=_SECONDS),
    "shoal_engine_request_seconds": About("histogram", "from a request's arrival to its last token (likewise)",
                                          boundaries=_SECONDS),
}  # fmt: skip

# Of each batch job, from its own process, over the job's whole life unless said; tags job and model.
JOB_METRICS = {
    "shoal_job_rows": About("gauge", "rows by state: total, answered, failed, resumed", ("state",)),
    "shoal_job_errors": About("gauge", "rows that ended in an error, by code", ("code",)),
    "shoal_job_committed_tokens": About("gauge", "generated tokens that are in answers"),
    "shoal_job_wasted_tokens": About("gauge", "generated tokens that are in no answer and never will be"),
    "shoal_job_generated_tokens": About("gauge", "tokens that engines made"),
    "shoal_job_prompt_tokens": About("gauge", "prompt tokens of answered rows"),
    "shoal_job_cached_tokens": About("gauge", "of those, tokens from the prefix cache"),
    "shoal_job_engine_deaths": About("counter", "engines that died, in this run"),
    "shoal_job_quarantined_rows": About("counter", "rows put aside because engines died of them, in this run"),
    "shoal_job_engines": About("gauge", "engines that are up"),
    "shoal_job_eta_seconds": About("gauge", "estimated time to the end"),
}
METRICS = ENGINE_METRICS | JOB_METRICS


def exported_names(name: str) -> set[str]:
    """Under which names Prometheus has a metric."""
    kind = METRICS[name].kind
    if kind == "histogram":
        return {f"ray_{name}_{part}" for part in ("bucket", "count", "sum")}
    return {f"ray_{name}_total" if kind == "counter" else f"ray_{name}"}


class Publisher:
    """Gives values to Ray. Its process must have joined a cluster. For one thread."""

    def __init__(self, tags: dict[str, str]) -> None:
        """`tags`: those of every value."""
        self._tags = tags
        self._made: dict[str, Any] = {}
        self._totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def gauge(self, name: str, value: float, **tags: str) -> None:
        """A value of now."""
        self._metric(name, "gauge").set(float(value), tags=self._tags | tags)

    def total(self, name: str, value: float, **tags: str) -> None:
        """A counter's new total; what it grew by goes out."""
        key = (name, tuple(sorted(tags.items())))
        grown = value - self._totals.get(key, 0.0)
        if grown > 0:
            self._metric(name, "counter").inc(float(grown), tags=self._tags | tags)
            self._totals[key] = value

    def observe(self, name: str, value: float) -> None:
        """One value of a distribution."""
        self._metric(name, "histogram").observe(float(value), tags=self._tags)

    def _metric(self, name: str, kind: str) -> Any:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = _make(name, METRICS[name], tuple(self._tags))
        assert METRICS[name].kind == kind, f"{name} is a {METRICS[name].kind}"
        return made


def _make(name: str, about: About, common: tuple[str, ...]) -> Any:
    from ray.util import metrics

    tags = common + about.tags
    if about.kind == "histogram":
        return metrics.Histogram(name, about.description, boundaries=list(about.boundaries), tag_keys=tags)
    kind = metrics.Counter if about.kind == "counter" else metrics.Gauge
    return kind(name, about.description, tag_keys=tags)
