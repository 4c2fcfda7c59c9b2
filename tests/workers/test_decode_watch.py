"""The watch that a benchmark puts in front of a rank's `execute`, and what it makes of a trace."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shoal.workers.decode_watch import DecodeWatch, covered, outermost, summarize


def test_intervals():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1.5, 2.5)]) == 4
    events = [("outer", (0, 10)), ("inner", (0, 4)), ("inner", (5, 10)), ("next", (10, 12))]
    assert outermost(events) == [("outer", (0, 10)), ("next", (10, 12))]
    rows = summarize([("a", (0, 1000)), ("b", (1000, 4000)), ("a", (5000, 6000))], 10_000)
    assert rows == [
        {"name": "b", "calls": 1, "total_ms": 3.0, "share": 0.3},
        {"name": "a", "calls": 2, "total_ms": 2.0, "share": 0.2},
    ]


class FakeRunner:
    """Every step is one product."""

    def __init__(self):
        self.device = torch.device("cpu")

    def execute(self, plan):
        return torch.mm(torch.ones(64, 64), torch.ones(64, 64))


def make_plan(num_rows, count=1, num_steps=2):
    return SimpleNamespace(
        rows=np.arange(num_rows),
        samples=np.ones(num_rows, np.uint8),
        num_scheduled_tokens=np.full(num_rows, count),
        num_steps=num_steps,
    )


def test_watch_waits_for_a_full_batch_and_ends_with_it():
    runner = FakeRunner()
    watch = DecodeWatch(runner, num_rows=4, host_s=0.0, profile_s=60.0)
    for plan in (make_plan(3), make_plan(4, count=5), make_plan(4), make_plan(4), make_plan(4), make_plan(3)):
        runner.execute(plan)
    seen = watch.end()
    assert runner.execute.__self__ is runner
    # The first full plan is for the host's time, the next two are in the profile, and the last has a row too few.
    assert (seen["num_host_steps"], seen["num_steps"], seen["num_rows"]) == (2, 4, 4)
    calls = {row["name"]: row["calls"] for row in seen["kernels"]}
    assert calls["aten::mm"] == 2
    assert calls["aten::ones"] == 4
    assert 0 <= seen["idle_share"] < 1
    assert seen["step_ms"] == pytest.approx(seen["seconds"] * 1e3 / 4)


def test_watch_that_saw_too_little():
    runner = FakeRunner()
    watch = DecodeWatch(runner, num_rows=4, host_s=60.0, profile_s=60.0)
    for plan in (make_plan(4), make_plan(1)):
        runner.execute(plan)
    assert watch.end() is None
