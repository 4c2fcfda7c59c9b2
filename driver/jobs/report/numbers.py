"""A job in numbers, over all its runs, from what is in its state folder. Nothing else is needed: no model, no Ray."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shoal.driver.jobs.outcome import Status
from shoal.driver.jobs.state.store import StateStore
from shoal.driver.jobs.status import RUN_FILE, SAMPLES_FILE, STATUS_FILE

ENDED = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
_TAIL = 0.1  # the last part of the rows
Points = list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the job's command."""

    about: dict[str, Any]  # as in its file
    points: Points
    start: float  # seconds of work of the runs before it

    @property
    def began(self) -> float:
        """When, in seconds of time.time()."""
        return float(min(self.about["times"].values(), default=self.about["written"]))

    @property
    def seconds(self) -> float:
        """How long it took; of one that was killed, up to what it last wrote."""
        return max(0.0, self._ended - self.began)

    @property
    def _ended(self) -> float:
        times = self.about["times"]
        last = [times[status.value] for status in ENDED if status.value in times]
        return float(max([*last, *(point["time"] for point in self.points[-1:])], default=self.about["written"]))

    @property
    def killed(self) -> bool:
        """Whether it ended without saying how, or still runs."""
        return self.about["status"] not in ENDED

    def at(self, when: float) -> float:
        """Seconds of work of the whole job at a time of this run."""
        return self.start + when - self.began


def load_runs(store: StateStore) -> list[Run]:
    """All runs since the job was last begun from nothing, oldest first. ValueError where there is none."""
    runs: list[Run] = []
    for epoch in store.epochs():
        found = store.get(RUN_FILE.format(epoch=epoch))
        if found is None:  # it ended before it could say anything
            continue
        about = json.loads(found)
        if about["fresh"]:
            runs = []
        points = json.loads(store.get(SAMPLES_FILE.format(epoch=epoch)) or b"[]")
        start = runs[-1].start + runs[-1].seconds if runs else 0.0
        runs.append(Run(about, points, start))
    if not runs:
        raise ValueError("no run of a job has left its history here")
    return runs


def gather(store: StateStore, runs: Sequence[Run]) -> dict[str, Any]:
    """The content of report.json."""
    status = json.loads(store.get(STATUS_FILE) or b"{}")
    if not status:
        raise ValueError(f"there is no {STATUS_FILE}")
    last = runs[-1].about
    tokens = status["tokens"]
    answering = _answering_s(runs)
    generated = tokens["generated"]
    rows = status["request_counts"]
    return {
        **status,
        "model": last["model"],
        "input": last["input"],
        "output": last["output"],
        "time": {
            "began": runs[0].began,
            "ended": runs[-1].began + runs[-1].seconds,
            "work_s": round(sum(run.seconds for run in runs), 2),
            "answering_s": round(answering, 2),
            "stages_s": _stages(runs),
        },
        "mean_rates": {
            "rows_s": _rate(rows["completed"] + rows["failed"], answering),
            "prompt_tok_s": _rate(tokens["prompt"], answering),
            "generated_tok_s": _rate(generated, answering),
        },
        "waste": {
            "tokens": tokens["wasted"],
            "share": round(tokens["wasted"] / generated, 4) if generated else 0.0,
            "equals_s": round(answering * tokens["wasted"] / generated, 1) if generated else 0.0,
            "without_engine_s": round(_idle_s(runs), 1),
        },
        "batch": _batch(runs),
        "tail": _tail(runs, rows["completed"] + rows["failed"]),
        "lengths": {name: lengths(last[f"{name}_lengths"], tokens, name) for name in ("prompt", "output")},
        "all_runs": {
            "runs": len(runs),
            **{name: sum(run.about[name] for run in runs) for name in ("deaths", "boot_failures", "quarantined")},
            "preemptions": _preemptions(runs),
        },
        "runs": [
            {"began": run.began, "seconds": round(run.seconds, 2), "killed": run.killed}
            | {name: run.about[name] for name in ("epoch", "status", "message", "host", "times", "deaths")}
            for run in runs
        ],
        "events": [event | {"epoch": run.about["epoch"]} for run in runs for event in run.about["events"]],
        "engine": last["engine"],
        "engines_resolved": last["engines"],
        "job": last["job"],
        "versions": last["versions"],
    }


def lengths(histogram: list[list[int]], tokens: dict[str, Any], name: str) -> dict[str, Any]:
    """Of answered rows; percentiles are the lower ends of buckets (3% wide beyond 64 tokens)."""
    count = sum(number for _, number in histogram)
    if not count:
        return {"rows": 0, "histogram": []}
    sums, seen = [], 0
    for _, number in histogram:
        seen += number
        sums.append(seen)
    total = tokens["prompt" if name == "prompt" else "committed"]
    return {
        "rows": count,
        "mean": round(total / count, 1),
        **{f"p{p}": histogram[bisect_left(sums, count * p / 100)][0] for p in (50, 90, 99)},
        "max": histogram[-1][0],
        "histogram": histogram,
    }


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 2) if seconds > 0 else 0.0


def _stages(runs: Sequence[Run]) -> dict[str, float]:
    """Seconds in each stage, runs added up."""
    found = {"validate": 0.0, "start_engine": 0.0, "answer": 0.0, "publish": 0.0}
    for run in runs:
        times = run.about["times"]
        end = run.began + run.seconds
        work = times.get(Status.IN_PROGRESS)
        found["validate"] += (work or end) - run.began
        if work is None:
            continue
        over = times.get(Status.FINALIZING, end)
        up = min(_first_up(run) or over, over)
        found["start_engine"] += up - work
        found["answer"] += over - up
        found["publish"] += end - over
    return {name: round(seconds, 2) for name, seconds in found.items()}


def _first_up(run: Run) -> float | None:
    return next((event["time"] for event in run.about["events"] if event["kind"] == "engine_up"), None)


def _answering_s(runs: Sequence[Run]) -> float:
    """Seconds from the first engine's start in each run to the last of its rows."""
    total = 0.0
    for run in runs:
        up = _first_up(run)
        if up is not None:
            end = run.about["times"].get(Status.FINALIZING, run.began + run.seconds)
            total += max(0.0, end - up)
    return total


def _idle_s(runs: Sequence[Run]) -> float:
    """Seconds after a first engine was up in which a run had none: the price of restarts."""
    total = 0.0
    for run in runs:
        up = _first_up(run)
        for one, two in pairwise(run.points):
            if up is not None and up < one["time"] and one["slots"] == two["slots"] == 0:
                total += two["time"] - one["time"]
    return total


def _batch(runs: Sequence[Run]) -> dict[str, float]:
    """Rows running and the KV cache in use, over the time in which engines were up."""
    rows = slots = seconds = usage = 0.0
    most = most_usage = 0.0
    for run in runs:
        for one, two in pairwise(run.points):
            if one["slots"]:
                span = two["time"] - one["time"]
                seconds += span
                rows += span * one["running"]
                slots += span * one["slots"]
                usage += span * one["kv_cache_usage"]
            most, most_usage = max(most, two["running"]), max(most_usage, two["kv_cache_usage"])
    return {
        "mean_running": round(rows / seconds, 2) if seconds else 0.0,
        "max_running": most,
        "occupancy": round(rows / slots, 4) if slots else 0.0,
        "mean_kv_cache_usage": round(usage / seconds, 4) if seconds else 0.0,
        "max_kv_cache_usage": round(most_usage, 4),
    }


def _tail(runs: Sequence[Run], settled: int) -> dict[str, Any] | None:
    """How long the last rows took. None where the job is not at its end."""
    points = [(run.at(point["time"]), point) for run in runs for point in run.points]
    if runs[-1].about["status"] != Status.COMPLETED or not points or not settled:
        return None
    end = points[-1][0]
    begins = next((when for when, point in points if point["settled"] >= settled * (1 - _TAIL)), end)
    work = max(_answering_s(runs), 1e-9)
    return {"rows_share": _TAIL, "seconds": round(end - begins, 2), "time_share": round((end - begins) / work, 4)}


def _preemptions(runs: Sequence[Run]) -> int:
    """Engines count from nothing at each start."""
    total = 0.0
    for run in runs:
        for one, two in pairwise(run.points):
            total += max(0.0, two["preemptions"] - one["preemptions"])
    return int(total)
