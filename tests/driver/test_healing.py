"""The driver's loop over ranks that live in this process and die, hang or run out of memory: no Ray."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace

import pytest

from shoal.driver import gang
from shoal.driver.actor import Driver
from shoal.driver.config import make_config
from shoal.driver.healing import EngineDeadError
from shoal.driver.params import SamplingParams
from shoal.driver.placement import PlacementError
from shoal.driver.replica import Place
from shoal.driver.request import EngineRequest
from shoal.driver.worker_group import RankDiedError, StepMemoryError
from shoal.workers.config import LoadConfig
from shoal.workers.plan import SchedulerOutput

LENGTH = 30


class Died(Exception):
    """What the stub's os._exit is here."""


class FakeGroup:
    """A lone rank, in a thread's stead: steps are run when their results are asked for."""

    faults: queue.SimpleQueue  # (method, exception to raise in it), in order
    made: list

    def __init__(self, config, device, env, node_id=None):
        self.device, self.world_size, self.stage_size, self.num_stages = device, 1, 1, 1
        self.probes = [{"pid": 1, "born": 1, "node_id": "n", "node_ip": "ip", "num_cpus": 1}]
        self.ranks, self.calls = [], []
        self.failure, self.dead = None, threading.Event()
        self.made.append(self)
        if len(self.made) in self.cannot_start:
            raise PlacementError("no place for it")

    def setup(self, configs, processors, timeout_s):
        self.runner = self.stub.StubRunner("0", None)
        return [{"load_s": 0.0, "weight_bytes": 1, "block_bytes": 1024}]

    def run(self, method, *args):
        self.calls.append(method)
        if method == "free_memory":
            self.failure = None
        return [None]

    def open_channel(self, kind):
        self.frames = queue.SimpleQueue()
        return self

    def send(self, step_id, frame):
        self.frames.put(frame)

    def receive(self):
        plan = SchedulerOutput.decode(self.frames.get())
        self.steps = getattr(self, "steps", 0) + 1
        if (len(self.made), self.steps) in self.deaths:
            self.dead.set()
        if self.dead.is_set():
            raise RankDiedError("rank 0 died (its step channel closed)")
        try:
            if self.failure is None:
                return self.runner.execute(plan).wait().encode()
        except MemoryError as error:
            self.failure = error
        except Died:
            self.dead.set()
            raise RankDiedError("rank 0 died (its step channel closed)") from None
        raise StepMemoryError(f"rank 0 failed in a step:\n{self.failure}", plan.step_id)

    def wait_for_death(self, timeout_s):
        return "rank 0 died" if self.dead.wait(timeout_s) else None

    def close(self):
        pass

    def kill(self):
        pass

    discard = shutdown = give_up = kill


@pytest.fixture
def start(monkeypatch, stub_ranks):
    """start(deaths, cannot_start, **engine arguments) -> driver. deaths: (number of the rank's life, its step)."""
    drivers = []

    def exit_(code):
        raise Died

    monkeypatch.setattr(stub_ranks.os, "_exit", exit_)

    def make(deaths=(), cannot_start=(), place=Place(), **arguments):  # noqa: B008
        group = type("Group", (FakeGroup,), {"made": [], "deaths": set(deaths), "cannot_start": set(cannot_start)})
        group.stub = stub_ranks
        monkeypatch.setattr(gang, "WorkerGroup", group)
        monkeypatch.setattr(gang.ray, "cluster_resources", dict)
        context = SimpleNamespace(get_actor_id=lambda: "an actor")
        monkeypatch.setattr(gang.ray, "get_runtime_context", lambda: context)
        config = make_config(
            model="m", max_num_seqs=8, max_model_len=128, kv_cache_memory_bytes=1 << 20, restart_backoff_s=0.01,
            device="cpu", disable_log_stats=True, **arguments,
        )  # fmt: skip
        driver = Driver(config, [None, 0], {})
        driver._gang.place(place)
        spec = SimpleNamespace(
            max_position_embeddings=128, check_tensor_parallel=lambda n: None, check_pipeline_parallel=lambda n: None,
            architecture="Stub", checkpoint_dtype="float32",
        )  # fmt: skip
        driver.start(spec, LoadConfig("m", "dummy"), None)
        driver.groups = group.made
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.shutdown()


def requests(count=24, length=4, **faults):
    found = []
    for number in range(count):
        extra = faults.get(f"row{number}", {})
        params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, extra_args=extra)
        found.append(EngineRequest(number, [3] * length, params, stream=1000 + number))
    return found


def collect(driver, count, timeout=60):
    finished, deaths, mark = {}, [], 0
    deadline = time.monotonic() + timeout
    while len(finished) < count:
        assert time.monotonic() < deadline, f"{len(finished)} of {count}"
        news = driver.collect(mark, 0.2)
        mark = news.mark
        deaths += news.deaths
        for result in news.finished:
            assert result.number not in finished
            finished[result.number] = result
    return finished, deaths


def check(stub_ranks, finished, failed=()):
    for number, result in finished.items():
        made = [stub_ranks.token_at(1000 + number, t) for t in range(LENGTH)]
        if number in failed:
            assert result.finish_reason == "error"
        else:
            assert (result.token_ids, result.finish_reason) == (made, "length")


def test_deaths_at_any_step(start, stub_ranks):
    driver = start(deaths=[(1, 1), (2, 9), (3, 2), (4, 30)], cannot_start=[3])
    driver.submit(requests())
    finished, deaths = collect(driver, 24)
    check(stub_ranks, finished)
    assert len(deaths) == 3, "a life that could not begin is none"
    assert deaths[0].tried
    assert not any(death.guilty for death in deaths)
    assert len(driver.groups) == 5
    assert driver.groups[0].steps == 1
    metrics = {metric.name: metric for metric in driver.metrics()}
    assert metrics["shoal:engine_restarts"].value == 4


def test_a_row_that_kills_ends_with_an_error(start, stub_ranks):
    driver = start()
    driver.submit(requests(row6={"kill": True}))
    finished, deaths = collect(driver, 24)
    check(stub_ranks, finished, failed=[6])
    assert finished[6].error_code == "engine_killed"
    assert "died 3 times with this row alone in it, and 2 times with others" in finished[6].error
    assert [death.guilty for death in deaths] == [[], [], [], [], [6]]
    assert [death.tried for death in deaths[2:]] == [[(6, True)]] * 3


def test_death_while_idle_is_healed(start, stub_ranks):
    driver = start()
    driver.groups[0].dead.set()
    deadline = time.monotonic() + 20
    while len(driver.groups) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    driver.submit(requests(4))
    finished, deaths = collect(driver, 4)
    check(stub_ranks, finished)
    assert [death.tried for death in deaths] == [[]]


def test_one_of_many_engines_does_not_wait_for_a_place(start):
    driver = start(cannot_start=[2], deaths=[(1, 3)], place=Place(one_of_many=True))
    driver.submit(requests())
    with pytest.raises(EngineDeadError, match="its ranks died, and there is no place for new ones: no place for it"):
        collect(driver, 24)
    assert len(driver.groups) == 2


def test_too_many_deaths_end_the_engine(start):
    driver = start(cannot_start=range(2, 100), deaths=[(1, 3)], max_rank_restarts=3)
    driver.submit(requests())
    with pytest.raises(EngineDeadError, match=r"died 4 times with no request finished .*max_rank_restarts=3.*no place"):
        collect(driver, 24)
    with pytest.raises(EngineDeadError):
        driver.submit(requests(1))
    assert len(driver.groups) == 4


def test_smaller_steps_where_memory_is_short(start, stub_ranks, monkeypatch):
    monkeypatch.setenv("SHOAL_STUB_MOST_TOKENS", "50")
    driver = start()
    driver.submit(requests(length=60))
    finished, deaths = collect(driver, 24)
    check(stub_ranks, finished)
    assert deaths == []
    assert len(driver.groups) == 1, "the rank went on"
    assert "free_memory" in driver.groups[0].calls


@pytest.mark.parametrize("number", [0, 5, 23])
def test_a_row_that_fits_no_memory_fails_alone(start, stub_ranks, number):
    driver = start()
    driver.submit(requests(**{f"row{number}": {"greedy": True}}))
    finished, deaths = collect(driver, 24)
    check(stub_ranks, finished, failed=[number])
    assert finished[number].error_code == "out_of_memory"
    assert deaths == []
    assert driver._scheduler.limits.max_num_seqs == 8, "nobody else is held back"


def test_sleep_outlives_a_death(start, stub_ranks):
    driver = start(enable_sleep_mode=True)
    driver.sleep(1, "wait")
    driver.groups[0].dead.set()
    deadline = time.monotonic() + 20
    while len(driver.groups) < 2 or "sleep" not in driver.groups[1].calls:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="sleeps"):
        driver.submit(requests(1))
    driver.wake_up(None)
    driver.submit(requests(4))
    check(stub_ranks, collect(driver, 4)[0])
