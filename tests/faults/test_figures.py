"""How soon faults are noticed and how long healing takes, as docs/reliability.md has it: `pytest -m soak -s`."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import threading
import time

import pytest

from shoal import SamplingParams

PROMPTS = [[3 + i % 50, 4, 5 + i % 7] for i in range(160)]
PARAMS = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
STEP_TIMEOUT_S = 2.0
FIRST_ROWS = 40  # answered before the fault, so that steps are no longer the first


def ids(outputs):
    return [list(part.token_ids) for output in outputs for part in output.outputs]


def strike(llm, what):
    """Does it, and says when."""
    import ray

    driver = llm.llm_engine._driver
    pids = ray.get(driver.rank_pids.remote())
    target, number = {
        "a rank, SIGKILL": (pids[1], signal.SIGKILL),
        "a rank, SIGSTOP": (pids[0], signal.SIGSTOP),
        "the driver, SIGKILL": (llm.llm_engine.driver_pid(), signal.SIGKILL),
    }[what]
    os.kill(target, number)
    return time.monotonic()


@pytest.mark.soak
@pytest.mark.parametrize("what", ["a rank, SIGKILL", "a rank, SIGSTOP", "the driver, SIGKILL"])
def test_how_soon(ray_cluster, make_llm, what) -> None:
    quiet = make_llm(tensor_parallel_size=2)
    expected = ids(quiet.generate(PROMPTS, PARAMS, use_tqdm=False))
    quiet.shutdown()
    noticed, healed = [], []
    for _ in range(3):
        llm = make_llm(tensor_parallel_size=2, step_timeout_s=STEP_TIMEOUT_S)
        struck, answers, enough = [], [], threading.Event()
        collect, revive = llm.llm_engine.collect, llm.llm_engine._revive

        def noted(timeout, collect=collect, answers=answers, enough=enough):
            collected = collect(timeout)
            answers.extend([time.monotonic()] * len(collected.finished))
            if len(answers) >= FIRST_ROWS:
                enough.set()
            return collected

        def revived(error, revive=revive, struck=struck):
            noticed.append(time.monotonic() - struck[0])
            revive(error)

        def hit(llm=llm, struck=struck, enough=enough):
            enough.wait()
            struck.append(strike(llm, what))
            while not llm.deaths and what != "the driver, SIGKILL":
                time.sleep(0.002)
            if what != "the driver, SIGKILL":
                noticed.append(time.monotonic() - struck[0])

        llm.llm_engine.collect, llm.llm_engine._revive = noted, revived
        thread = threading.Thread(target=hit)
        thread.start()
        assert ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected, "nothing is lost, nothing is made twice"
        thread.join()
        gaps = [later - earlier for earlier, later in itertools.pairwise(answers)]
        healed.append(max(gaps))
        llm.shutdown()
    print(
        f"\nFIGURES {what} | {len(noticed)} | noticed {statistics.median(noticed):.2f} s | next answer after "
        f"{statistics.median(healed):.1f} s | lost 0 of {len(PROMPTS)} rows",
        flush=True,
    )
