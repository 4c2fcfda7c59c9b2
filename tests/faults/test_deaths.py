"""What dies, freezes, hangs or runs out of memory inside one engine, and that no request is lost by it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from shoal import SamplingParams

PROMPTS = [[3 + i % 50, 4, 5 + i % 7] for i in range(24)]
PARAMS = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)


def ids(outputs):
    return [list(part.token_ids) for output in outputs for part in output.outputs]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, stub_ranks, stub_model):
    """Tokens of the first rows of an engine to which nothing happens; a stub's depend on the row's number only."""
    from shoal import LLM
    from shoal.driver import engine

    before = stub_ranks.install()
    with LLM(stub_model, max_num_seqs=8, max_model_len=256) as llm:
        found = ids(llm.generate(PROMPTS * 4, PARAMS, use_tqdm=False))
    engine.RemoteDriver = before
    return found


def ranks(llm):
    import ray

    return ray.get(llm.llm_engine._driver.rank_pids.remote())


def groups():
    from ray.util import placement_group_table

    return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def later(seconds, function, *arguments):
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_stopped_rank_is_noticed_named_and_replaced(undisturbed, make_llm) -> None:
    again = make_llm(tensor_parallel_size=2, step_timeout_s=0.75)  # 3 s for the first steps
    victim, other = ranks(again)
    later(0.1, os.kill, victim, signal.SIGSTOP)
    assert ids(again.generate(PROMPTS, PARAMS, use_tqdm=False)) == undisturbed[:24]
    (death,) = again.deaths
    assert "a step did not end within" in death.reason
    assert f"rank 0 (pid {victim} on" in death.reason
    assert "its process is stopped" in death.reason
    assert f"pid {other} " not in death.reason, "the rank that waits is not blamed"
    assert gone(victim), "it was ended for good: SIGCONT brings nothing back"
    assert gone(other)
    assert set(ranks(again)).isdisjoint({victim, other})


def test_results_of_a_given_up_rank_are_ignored(undisturbed, make_llm, monkeypatch) -> None:
    """The ranks are given up but live on, as on a node that cannot be reached; they thaw while new ones work."""
    monkeypatch.setenv("SHOAL_STUB_SPARE_RANKS", "1")
    again = make_llm(step_timeout_s=0.75)
    (victim,) = ranks(again)
    later(0.1, os.kill, victim, signal.SIGSTOP)

    def thaw():
        while ranks(again) == [victim]:
            time.sleep(0.05)
        os.kill(victim, signal.SIGCONT)

    later(0.2, thaw)
    outputs = ids(again.generate(PROMPTS * 4, PARAMS, use_tqdm=False))
    assert outputs == undisturbed
    assert len(again.deaths) == 1
    assert not gone(victim), "it was alive all the time"
    os.kill(victim, signal.SIGKILL)


def test_frames_of_an_older_epoch_are_ignored() -> None:
    import numpy as np

    from shoal.driver.actor import Driver
    from shoal.driver.config import make_config
    from shoal.workers.plan import EPOCH_SHIFT, StepOutput

    def frame(epoch, count):
        return StepOutput((epoch << EPOCH_SHIFT) + count, np.zeros((1, 1), np.int32)).encode()

    frames = [frame(1, 7), frame(1, 8), frame(2, 0)]

    class Channel:
        def receive(self):
            return frames.pop(0)

    driver = Driver(make_config(model="m"), [None, 0], {})
    driver._gang.epoch, driver._gang.channel = 2, Channel()
    assert driver._receive().step_id == 2 << EPOCH_SHIFT


def test_a_step_that_never_ends(undisturbed, make_llm, capfd) -> None:
    """One row hangs the rank each time it is run: it ends with an error, the others do not notice."""
    llm = make_llm(step_timeout_s=0.5, max_solo_deaths=1)
    params = [PARAMS] * len(PROMPTS)
    params[5] = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, extra_args={"hang": True})
    outputs = llm.generate(PROMPTS, params, use_tqdm=False, on_error="return")
    assert [i for i, output in enumerate(outputs) if output.error] == [5]
    assert "died 1 times with this row alone in it, and 2 times with others" in outputs[5].error
    assert "a step did not end within" in outputs[5].error
    assert all(len(part) == 40 for part in ids(outputs))
    said, deadline = "", time.monotonic() + 20
    while "in execute" not in said and time.monotonic() < deadline:  # Ray brings the driver's log a moment later
        said += "".join(capfd.readouterr())
        time.sleep(0.1)
    assert "stacks of rank 0, epoch 0" in said
    assert "in execute" in said, "where the rank's loop stood"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_driver_is_replaced(undisturbed, make_llm, monkeypatch, number) -> None:
    monkeypatch.setattr("shoal.driver.engine.DRIVER_SILENT_S", 4.0)
    again = make_llm()
    driver, before = again.llm_engine.driver_pid(), ranks(again)
    later(0.1, os.kill, driver, number)
    assert ids(again.generate(PROMPTS, PARAMS, use_tqdm=False)) == undisturbed[:24]
    assert again.llm_engine.driver_pid() != driver
    assert gone(driver)
    deadline = time.monotonic() + 20
    while not all(map(gone, before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(gone, before)), "its ranks went with it"
    assert len(groups()) == 1, "and its placement group: the new driver has one"


def test_steps_that_do_not_fit_the_memory(undisturbed, make_llm, monkeypatch) -> None:
    """Smaller steps, in the same process, and the same tokens."""
    prompts = [[3 + i % 50] * 60 for i in range(12)]
    monkeypatch.setenv("SHOAL_STUB_MOST_TOKENS", "100")
    llm = make_llm(step_channel="ray")
    before = ranks(llm)
    assert ids(llm.generate(prompts, PARAMS, use_tqdm=False)) == undisturbed[:12]
    assert llm.deaths == []
    assert ranks(llm) == before


def test_a_row_that_fits_no_memory_fails_alone(undisturbed, make_llm) -> None:
    """Of two ranks, which are made anew: one may wait for the other inside the step."""
    llm = make_llm(tensor_parallel_size=2)
    params = [PARAMS] * len(PROMPTS)
    params[5] = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, extra_args={"greedy": True})
    outputs = llm.generate(PROMPTS, params, use_tqdm=False, on_error="return")
    assert [i for i, output in enumerate(outputs) if output.error] == [5]
    assert "out of memory in a step of" in outputs[5].error
    assert "a row that fits no memory" in outputs[5].error
    assert all(len(part) == 40 for part in ids(outputs))
    assert len(ids(outputs)) == len(PROMPTS) - 1
    assert llm.deaths == []
    assert len(ids(llm.generate(PROMPTS[:4], PARAMS, use_tqdm=False))) == 4
