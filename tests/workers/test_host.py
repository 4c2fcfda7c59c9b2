"""Memory that a CPU rank frees stays with its process."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
