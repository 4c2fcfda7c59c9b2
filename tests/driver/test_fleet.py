"""Several engines behind the calls of one, over engines that count and die as they are told. No Ray."""

import threading
import time
from types import SimpleNamespace

import pytest

from shoal.driver.config import make_config
from shoal.driver.feed import Feed, RequestBatch
from shoal.driver.fleet import Fleet
from shoal.driver.metrics import Counter, Gauge, Histogram
from shoal.driver.params import SamplingParams
from shoal.driver.progress import Progress
from shoal.driver.replica import Place
from shoal.driver.request import EngineRequest, FinishedRequest

SLOTS = 4


class Dead(RuntimeError):
    pass


class FakeEngine:
    """Finishes up to SLOTS requests at each collect; an output is its request's stream."""

    def __init__(self, name, max_model_len=64):
        self.resolved = SimpleNamespace(max_num_seqs=SLOTS, kv_cache_tokens=1024, max_model_len=max_model_len)
        self.name, self.queue, self.seen, self.calls = name, {}, [], []
        self.lock, self.dead, self.held, self.closed = threading.Lock(), False, False, 0

    def check(self):
        if self.dead:
            raise Dead(f"engine {self.name} died")

    def submit(self, requests):
        with self.lock:
            self.check()
            self.seen += [request.number for request in requests]
            for request in requests:
                assert request.number not in self.queue
                self.queue[request.number] = request
                self.dead |= bool((request.params.extra_args or {}).get("kill"))

    def collect(self, timeout):
        time.sleep(0.001)
        with self.lock:
            self.check()
            numbers = [] if self.held else list(self.queue)[:SLOTS]
            done = [FinishedRequest(n, [self.queue.pop(n).stream], "length") for n in numbers]
        if not done:
            time.sleep(0.005)
        left = len(self.queue)
        return SimpleNamespace(
            finished=done, num_running=min(left, SLOTS), num_waiting=max(0, left - SLOTS), kv_cache_usage=0.5,
            num_made_tokens=0, num_preemptions=0, deaths=[],
        )  # fmt: skip

    def abort(self, numbers):
        with self.lock:
            self.check()
            for number in numbers:
                self.queue.pop(number, None)

    def num_made_tokens(self):
        return 7

    def call_workers(self, method, timeout, args, kwargs):
        return [f"{self.name}:{method}"]

    def reset_prefix_cache(self, reset_running_requests=False):
        return self.name != "busy"

    def sleep(self, level, mode):
        self.calls.append(("sleep", level, mode))

    def wake_up(self, tags):
        self.calls.append(("wake_up", tags))

    def metrics(self):
        return [Counter("c", 2), Gauge("g_perc", 0.5), Gauge("g", 3.0), Histogram("h", 1, 2.0, {"+Inf": 1})]

    def shutdown(self):
        self.closed += 1


class Cluster:
    """Where engines are started, and what room there is."""

    def __init__(self):
        self.engines, self.room, self.failing, self.lengths = [], 2, [], {}

    def start(self, place=None):
        if self.failing:
            raise self.failing.pop(0)
        number = len(self.engines)
        self.engines.append(FakeEngine(number, self.lengths.get(number, 64)))
        return self.engines[-1]

    def find(self, wanted, others):
        free = [Place(f"node {i}") for i in range(self.room - len(others))]
        return free if wanted is None else free[:wanted] + [Place()] * (wanted - len(free))


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr("shoal.driver.replicas.RETRY_S", 0.01)
    monkeypatch.setattr("shoal.driver.replicas.LOOK_S", 0.01)
    return Cluster()


@pytest.fixture
def make(cluster):
    made = []

    def call(count, **changes):
        config = make_config(model="m", **changes)
        made.append(Fleet(config, count, cluster.start, cluster.find, lambda: None))
        return made[-1]

    yield call
    for fleet in made:
        fleet.shutdown()
    assert all(engine.closed == 1 for engine in cluster.engines)


def requests(count, first=0, **params):
    sampling = SamplingParams(max_tokens=8, **params)
    return [EngineRequest(n, [n] * 8, sampling, stream=1000 + n) for n in range(first, first + count)]


def run(fleet, batch_requests):
    batch = RequestBatch(batch_requests)
    with Progress(False, 0) as silent:
        Feed(fleet).run([batch], silent)
    return batch


def test_rows_are_shared_and_all_come_back(make, cluster):
    fleet = make(3)
    batch = run(fleet, requests(1000))
    assert {n: result.token_ids for n, result in batch.results.items()} == {n: [1000 + n] for n in range(1000)}
    shares = [len(engine.seen) for engine in cluster.engines]
    assert len(shares) == 3
    assert min(shares) > 200
    assert fleet.num_replicas == 3
    assert fleet.window == 3 * (2 * SLOTS + 256)


def test_a_dead_engine_is_replaced_and_its_rows_go_on(make, cluster):
    fleet = make(2)
    first = cluster.engines[0]
    first.held = True
    fleet.submit(requests(100))
    deadline = time.monotonic() + 20
    while len(cluster.engines[1].queue) or not first.queue:
        fleet.collect(0.01)
        assert time.monotonic() < deadline
    first.dead = True
    batch = run(fleet, requests(200, first=1000))
    assert len(batch.results) == 200
    assert len(cluster.engines) == 3
    fleet.abort(list(range(100)))


def test_a_row_that_kills_engines_gets_the_error(make, cluster):
    fleet = make(2)
    killer = EngineRequest(50, [1], SamplingParams(max_tokens=8, extra_args={"kill": True}), stream=0)
    fleet.submit([*requests(50), killer, *requests(49, first=51)])
    results = {}
    deadline = time.monotonic() + 60
    while len(results) < 100:
        results.update((one.number, one) for one in fleet.collect(0.1).finished)
        assert time.monotonic() < deadline
    assert {n for n, one in results.items() if one.finish_reason == "error"} == {50}
    assert "died 3 times with this row alone in it" in results[50].error


def test_no_engine_left_is_an_error_with_its_reason(make, cluster):
    fleet = make(2)
    cluster.failing = [RuntimeError("no such device")] * 20
    for engine in cluster.engines:
        engine.dead = True
    with pytest.raises(RuntimeError, match="no engine could be started; the last time: RuntimeError: no such device"):
        run(fleet, requests(20))


def test_what_the_user_got_wrong_is_said_at_once(make, cluster):
    cluster.failing = [ValueError("max_model_len is too large")]
    with pytest.raises(ValueError, match="max_model_len is too large"):
        make(2)
    cluster.failing = [RuntimeError("boom")]
    with pytest.raises(RuntimeError, match="boom"):
        make(2)  # two were asked for


def test_auto_takes_what_fits_and_grows(make, cluster):
    fleet = make("auto")
    assert fleet.num_replicas == 2
    for engine in cluster.engines:
        engine.held = True
    fleet.submit(requests(500))
    cluster.room = 4
    deadline = time.monotonic() + 20
    while fleet.num_replicas < 4:
        fleet.collect(0.01)
        assert time.monotonic() < deadline
    cluster.room = 3
    cluster.engines[0].dead = True
    while len(cluster.engines[3].seen) < 100:
        fleet.collect(0.01)
        assert time.monotonic() < deadline
    assert fleet.num_replicas == 3
    assert len(cluster.engines) == 4, "there is no room for another"


def test_the_shortest_row_limit_counts(make, cluster):
    cluster.lengths = {1: 48}
    assert make(2).resolved.max_model_len == 48


def test_an_interrupt_leaves_nothing_behind(make, cluster, monkeypatch):
    fleet = make(2)
    for engine in cluster.engines:
        engine.held = True
    taken, take = [], fleet._take_news

    def interrupted(timeout):
        take(timeout)
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(fleet, "_take_news", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(fleet, requests(200))
    assert not any(engine.queue for engine in cluster.engines)
    for engine in cluster.engines:
        engine.held = False
    assert len(run(fleet, requests(100, first=500)).results) == 100


def test_prefixes_stay_together(make, cluster):
    fleet = make(2, block_size=16)
    rows = [EngineRequest(n, [n % 8] * 1024 + [n] * 4, SamplingParams(max_tokens=8), stream=n) for n in range(400)]
    run(fleet, rows)
    owners = [{n % 8 for n in engine.seen} for engine in cluster.engines]
    assert sum(map(len, owners)) <= 10, "8 if nothing had to be evened out, 16 without routing"


def test_calls_reach_every_engine(make, cluster):
    fleet = make(2)
    assert fleet.call_workers("probe", None, (), {}) == ["0:probe", "1:probe"]
    assert fleet.reset_prefix_cache()
    cluster.engines[1].name = "busy"
    assert not fleet.reset_prefix_cache()
    sums = {metric.name: metric for metric in fleet.metrics() if not metric.labels}
    assert (sums["c"].value, sums["g_perc"].value, sums["g"].value) == (4, 0.5, 6.0)
    assert (sums["h"].count, sums["h"].buckets) == (2, {"+Inf": 2})
    assert (sums["shoal:num_replicas"].value, sums["shoal:replica_deaths"].value) == (2, 0)
    own = [metric.value for metric in fleet.metrics() if metric.labels == {"replica": "1"} and metric.name == "c"]
    assert own == [2]


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
def test_sleep(make, cluster, mode):
    fleet = make(2)
    for engine in cluster.engines:
        engine.held = mode != "wait"
    fleet.submit(requests(100))
    fleet.sleep(1, mode)
    assert all(engine.calls == [("sleep", 1, mode)] for engine in cluster.engines)
    with pytest.raises(RuntimeError, match="sleeps"):
        fleet.submit(requests(1, first=1000))
    fleet.wake_up(None)
    results = {}
    for engine in cluster.engines:
        engine.held = False
    deadline = time.monotonic() + 20
    while len(results) < 100:
        results.update((one.number, one.finish_reason) for one in fleet.collect(0.1).finished)
        assert time.monotonic() < deadline
    reasons = set(results.values())
    assert reasons == (
        {"length"} if mode != "abort" else {"abort", "length"}
    )  # engines abort what they have themselves
