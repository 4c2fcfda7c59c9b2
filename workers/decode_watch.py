"""A look at a rank while every row decodes: what the host spends on a step, and what the device does meanwhile.

`start_watch` and `end_watch` are functions for `collective_rpc`. In between, the watch stands in front of the runner's
`execute` and waits for plans in which all expected rows decode; nothing has to be asked of the engine meanwhile, which
would let its pipeline run dry. They load torch when they run: the client that names them needs none.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.workers.actor import Worker
    from shoal.workers.pending import PendingOutput
    from shoal.workers.plan import SchedulerOutput

Interval = tuple[float, float]  # start and end


def start_watch(worker: Worker, num_rows: int, host_s: float, profile_s: float) -> None:
    """Rank 0: once `num_rows` rows decode together, time `execute` for `host_s` seconds, then profile `profile_s`."""
    if worker.rank == 0:
        DecodeWatch(worker.runner, num_rows, host_s, profile_s)


def end_watch(worker: Worker) -> dict[str, Any] | None:
    """Rank 0: what was seen, or None if such rows never decoded for long enough."""
    if worker.rank != 0:
        return None
    watch = worker.runner.execute.__self__
    assert isinstance(watch, DecodeWatch)
    return watch.end()


class DecodeWatch:
    """In front of `runner.execute` from when it is made until `end`."""

    def __init__(self, runner: Any, num_rows: int, host_s: float, profile_s: float) -> None:
        self._runner = runner
        self._execute = runner.execute
        self._num_rows, self._host_s, self._profile_s = num_rows, host_s, profile_s
        self._on_gpu = runner.device.type == "cuda"
        self._since = 0.0  # start of the phase
        self._profiler: Any = None
        self._phase = "waiting"  # then "host", "profile", "done"
        self._host_seconds = 0.0
        self._steps = {"host": 0, "profile": 0}
        self._warm_up_profiler()
        runner.execute = self.execute

    def execute(self, plan: SchedulerOutput) -> PendingOutput:
        """As the runner's own."""
        is_full = bool(
            len(plan.rows) >= self._num_rows and plan.samples.all() and (plan.num_scheduled_tokens == 1).all()
        )
        self._move_on(is_full)
        started = time.perf_counter()
        pending: PendingOutput = self._execute(plan)
        if self._phase == "host":
            self._host_seconds += time.perf_counter() - started
        if self._phase in self._steps:
            self._steps[self._phase] += plan.num_steps
        return pending

    def _move_on(self, is_full: bool) -> None:
        now = time.perf_counter()
        if self._phase == "waiting" and is_full:
            self._phase, self._since = "host", now
        elif self._phase == "host" and (not is_full or now - self._since >= self._host_s):
            self._phase = "profile" if is_full else "done"
            if is_full:
                self._start_profiler()
        elif self._phase == "profile" and (not is_full or now - self._since >= self._profile_s):
            self._stop_profiler()
            self._phase = "done"

    def _make_profiler(self) -> Any:
        from torch.profiler import ProfilerActivity, profile

        return profile(activities=[ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU])

    def _warm_up_profiler(self) -> None:
        """The first one of a process starts slowly, and holds up what it should watch."""
        import torch

        with self._make_profiler():
            torch.ones(1, device=self._runner.device)
            self._synchronize()

    def _start_profiler(self) -> None:
        self._synchronize()  # no kernel from before is seen in part
        self._profiler = self._make_profiler()
        self._profiler.start()
        self._since = time.perf_counter()

    def _stop_profiler(self) -> None:
        self._synchronize()
        self._profiler.stop()

    def _synchronize(self) -> None:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()

    def end(self) -> dict[str, Any] | None:
        """Leave the runner as it was; the figures."""
        del self._runner.execute  # its class's comes to light again
        if self._phase == "profile":
            self._stop_profiler()
        if self._profiler is None or not self._steps["profile"]:
            return None
        intervals = self._intervals()
        if not intervals:
            return None
        first, last = min(i[1][0] for i in intervals), max(i[1][1] for i in intervals)
        wall = last - first
        return {
            "num_rows": self._num_rows,
            "seconds": wall / 1e6,
            "num_steps": self._steps["profile"],
            "step_ms": wall / 1e3 / self._steps["profile"],
            "idle_share": 1 - covered(interval for _, interval in intervals) / wall,
            "host_ms_per_step": 1e3 * self._host_seconds / self._steps["host"],
            "num_host_steps": self._steps["host"],
            "kernels": summarize(intervals, wall),
        }

    def _intervals(self) -> list[tuple[str, Interval]]:
        """Name, start and end in microseconds of every kernel; on a CPU, of every operation called from Python."""
        with tempfile.TemporaryDirectory(prefix="shoal-trace-") as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        kind = "kernel" if self._on_gpu else "cpu_op"
        found = [(e["name"], (e["ts"], e["ts"] + e["dur"])) for e in events if e.get("cat") == kind]
        return found if self._on_gpu else outermost(found)


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def outermost(events: Sequence[tuple[str, Interval]]) -> list[tuple[str, Interval]]:
    """Those that do not lie inside another one."""
    kept: list[tuple[str, Interval]] = []
    for name, (start, end) in sorted(events, key=lambda event: (event[1][0], -event[1][1])):
        if not kept or start >= kept[-1][1][1]:
            kept.append((name, (start, end)))
    return kept


def summarize(events: Iterable[tuple[str, Interval]], wall: float) -> list[dict[str, Any]]:
    """Calls, milliseconds and share of the wall time by name, longest first."""
    calls: dict[str, int] = {}
    spent: dict[str, float] = {}
    for name, (start, end) in events:
        calls[name] = calls.get(name, 0) + 1
        spent[name] = spent.get(name, 0.0) + end - start
    return [
        {"name": name, "calls": calls[name], "total_ms": spent[name] / 1e3, "share": spent[name] / wall}
        for name in sorted(spent, key=spent.__getitem__, reverse=True)
    ]
