"""Machines that are lost, or cut off and back again (clauses 4 and 5); and how long it takes to go on."""

from __future__ import annotations

import os
import signal
import statistics
import time

import pytest

from shoal.driver.jobs.outcome import Exit

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

ROWS = [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(1500)]
SMALL = {"max_restarts": 40, "engine": {"max_num_seqs": 16}, "env": {"SHOAL_STUB_STEP_S": "0.05"}}


def check(ran):
    assert [row["id"] for row in ran.rows()] == [row["id"] for row in ROWS]
    assert all(row["error"] is None for row in ran.rows())
    done = [meta["id"] for meta in ran.records("ok")]
    assert len(done) == len(set(done)) == len(ROWS)


def test_a_node_that_is_frozen_and_thaws(start, nodes, write_rows):
    """Clause 4: Ray gives the node up, the job goes on elsewhere; what the zombie then says belongs to no row."""
    nodes.fill()
    ran = start(write_rows(ROWS), replicas=2, **SMALL)
    ran.wait_for(100)
    node = nodes.holding("ray::StubWorker")
    nodes.signal(node, signal.SIGSTOP)
    frozen = time.monotonic()
    try:
        nodes.fill(3)
        before = len(ran.records("ok"))
        while "died" not in ran.log.read_text():
            assert time.monotonic() < frozen + 60
            time.sleep(0.02)
        noticed = time.monotonic() - frozen
        ran.wait_for(before + 300, timeout=120)
    finally:
        nodes.signal(node, signal.SIGCONT)
        thawed = time.monotonic()
    assert ran.end(300) == Exit.COMPLETED, ran.log.read_text()[-4000:]
    nodes.drop(node)
    check(ran)
    print(f"SOAK frozen node: noticed after {noticed:.1f} s, thawed after {thawed - frozen:.1f} s", flush=True)


def test_a_job_that_is_frozen_and_thaws(start, write_rows):
    """Clause 5: a second run takes over and completes; the first wakes up, writes nothing more, and says why."""
    source = write_rows(ROWS)
    first = start(source, **SMALL)
    first.wait_for(300)
    os.kill(first.process.pid, signal.SIGSTOP)
    second = start(source, **SMALL)
    assert second.end(300) == Exit.COMPLETED, second.log.read_text()[-4000:]
    expected = second.rows()
    os.kill(first.process.pid, signal.SIGCONT)
    woken = time.monotonic()
    assert first.end() == Exit.SUPERSEDED, first.log.read_text()[-4000:]
    print(f"SOAK frozen job: stepped aside {time.monotonic() - woken:.2f} s after it woke up", flush=True)
    assert second.rows() == expected
    assert second.status()["status"] == "completed"
    check(second)


@pytest.mark.parametrize("kind", ["rank", "driver", "node"])
def test_how_long_it_takes(start, nodes, processes, write_rows, kind):
    """Clauses 3 and 4: one engine, killed three times; how soon the job knows, and when it has new answers."""
    nodes.fill()
    ran = start(write_rows(ROWS), **SMALL)
    noticed, healed = [], []
    for number in range(3):
        ran.wait_for(100 + 400 * number, timeout=120)
        deaths = ran.log.read_text().count("died with")
        killed = time.monotonic()
        if kind == "node":
            nodes.lose(nodes.holding("ray::StubWorker"))
        else:
            os.kill(processes.named({"rank": "ray::StubWorker", "driver": "ray::StubDriver"}[kind])[0], signal.SIGKILL)
        while ran.log.read_text().count("died with") == deaths:
            assert time.monotonic() < killed + 60, ran.log.read_text()[-4000:]
            time.sleep(0.005)
        noticed.append(time.monotonic() - killed)
        before = len(ran.records("ok"))
        if kind == "node":
            nodes.fill()
        ran.wait_for(before + 1, timeout=120)
        healed.append(time.monotonic() - killed)
    assert ran.end(300) == Exit.COMPLETED, ran.log.read_text()[-4000:]
    check(ran)
    tokens = ran.report()["tokens"]
    print(
        f"SOAK {kind} killed 3 times: noticed after {statistics.median(noticed):.2f} s (at most {max(noticed):.2f}), "
        f"answers after {statistics.median(healed):.1f} s (at most {max(healed):.1f}); {tokens['wasted']} tokens again",
        flush=True,
    )
