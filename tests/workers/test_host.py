"""A rank's process: its memory, its GPU, how it is told apart and ended."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from shoal.workers import host

SCRIPT = """
import resource, sys, threading
import torch
from shoal.workers.host import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else True

def churn():
    for _ in range(12):  # what a step allocates: activations and logits, more than one arena's heap together
        x = torch.empty(2048, 3072).fill_(1.0)
        y = x * 2
        logits = torch.ones(256, 49152)
        del x, y, logits

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def main():
    churn()
    churn()
    before = faults()
    churn()
    print(kept, faults() - before)

thread = threading.Thread(target=main)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_reused_without_page_faults() -> None:
    counts = {}
    for mode in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True, timeout=120
        )
        kept, count = done.stdout.split()
        assert kept == "True"
        counts[mode] = int(count)
    assert counts["keep"] * 2 < counts["default"]  # an odd buffer may still be new memory


@pytest.mark.parametrize(
    ("visible", "assigned", "index"),
    [("", [3], 3), ("2,3", [3], 1), ("2", [2], 0), ("GPU-a,GPU-b", ["GPU-b"], 1), ("0,1,2,3", ["2"], 2)],
)
def test_a_rank_finds_its_gpu_among_the_visible(monkeypatch, visible, assigned, index) -> None:
    """CUDA_VISIBLE_DEVICES of whoever started the node holds: Ray hands out what it names, torch counts within it."""
    from shoal.workers import actor

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(actor.ray, "get_gpu_ids", lambda: assigned)
    assert actor.Worker._gpu_index(None) == index


def test_a_stopped_process_is_ended_and_no_other() -> None:
    stopped, other = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    try:
        births = [host.born(stopped.pid), host.born(other.pid)]
        stopped.send_signal(signal.SIGSTOP)
        processes = [(stopped.pid, births[0]), (other.pid, births[1] + 1), (other.pid, None)]
        assert host.kill_processes(processes, 0, 10) == []
        assert stopped.wait(10) == -signal.SIGKILL
        assert other.poll() is None, "a process that took a dead one's id is spared"
    finally:
        stopped.kill()
        other.kill()
        stopped.wait()
        other.wait()
    assert host.born(stopped.pid) is None


def test_what_counts_as_out_of_memory() -> None:
    import torch

    assert host.is_out_of_memory(MemoryError())
    assert host.is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 45)
    assert host.is_out_of_memory(caught.value)
    assert not host.is_out_of_memory(RuntimeError("shapes differ"))
