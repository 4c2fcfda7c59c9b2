"""How many engines there are, by hand: a clock that tests set, engines that start at once or not at all."""

from concurrent.futures import Executor, Future
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from shoal.driver import cluster
from shoal.driver.config import check_count, make_config
from shoal.driver.placement import PlacementError
from shoal.driver.replica import Down, Place
from shoal.driver.replicas import MOST_FAILURES, NoEngineError, Replicas


class Inline(Executor):
    """Runs things at once."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class Started:
    """In place of Replica: remembers what was asked."""

    def __init__(self, number, start, inbox, delay_s=0.0):
        self.number, self.delay_s, self.place = number, delay_s, start()


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr("shoal.driver.replicas.Replica", Started)
    world = SimpleNamespace(now=0.0, free=[], looks=0)

    def find(wanted, others):
        world.looks += 1
        if isinstance(world.free, Exception):
            raise world.free
        return world.free if wanted is None else world.free[:wanted] + [Place()] * (wanted - len(world.free))

    def make(count):
        replicas = Replicas(
            count, lambda place: place, find, SimpleQueue(), clock=lambda: world.now, aside=Inline()
        )  # fmt: skip
        replicas.begin()
        return replicas

    world.make = make
    return world


def up(replicas):
    for one in list(replicas.alive.values()):
        replicas.came_up(one)


def tick(world, replicas, seconds=5.0):
    world.now += seconds
    replicas.tick()
    replicas.tick()


def nodes(replicas):
    return {number: one.place.node_id for number, one in sorted(replicas.alive.items())}


def test_as_many_as_asked_for(world):
    world.free = [Place("a"), Place("b")]
    replicas = world.make(3)
    assert nodes(replicas) == {0: "a", 1: "b", 2: None}, "the third says what is missing"
    up(replicas)
    tick(world, replicas)
    assert world.looks == 1, "nothing is missing, nobody looks"


def test_auto_takes_what_there_is_and_what_comes(world):
    replicas = world.make("auto")
    assert nodes(replicas) == {0: None}, "one at least, whose failure tells what is missing"
    up(replicas)
    world.free = [Place("a"), Place("b")]
    tick(world, replicas)
    assert nodes(replicas) == {0: None, 1: "a", 2: "b"}
    assert replicas.alive[1].place.timeout_s is not None, "where the room is gone again it does not stand in the queue"
    tick(world, replicas)
    assert world.looks == 2, "no second look while those are on their way"
    up(replicas)
    world.free = []
    tick(world, replicas, 0.1)
    tick(world, replicas)
    assert len(replicas.alive) == 3


def test_a_dead_one_is_replaced_at_once_or_where_there_is_room(world):
    world.free = [Place("a"), Place("b")]
    fixed, auto = world.make(2), world.make("auto")
    up(fixed), up(auto)
    error = RuntimeError("gone")
    fixed.went_down(Down(fixed.alive[0], error, True), error)
    assert nodes(fixed) == {0: None, 1: "b"}
    world.free = []
    auto.went_down(Down(auto.alive[0], error, True), error)
    tick(world, auto)
    assert nodes(auto) == {1: "b"}, "its node is gone: fewer rather than none"
    auto.went_down(Down(auto.alive[1], error, True), error)
    assert nodes(auto) == {1: None}, "the last one is always tried again"
    up(auto)
    world.free = [Place("c")]
    tick(world, auto)
    assert nodes(auto) == {0: "c", 1: None}
    assert (fixed.deaths, auto.deaths) == (1, 2)


def test_one_that_does_not_start_is_given_up_and_tried_later(world):
    world.free = [Place("a"), Place("b")]
    replicas = world.make(2)
    replicas.came_up(replicas.alive[0])
    error, delays = RuntimeError("boom"), []
    for _ in range(MOST_FAILURES):
        delays.append(replicas.alive[1].delay_s)
        replicas.went_down(Down(replicas.alive[1], error, False), error)
    assert delays == [0.0, 2.0, 4.0]
    assert list(replicas.alive) == [0]
    tick(world, replicas)
    assert list(replicas.alive) == [0], "it rests"
    tick(world, replicas, 600.0)
    assert list(replicas.alive) == [0, 1]
    lack = PlacementError("no room")
    replicas.went_down(Down(replicas.alive[1], lack, False), lack)
    assert list(replicas.alive) == [0], "no use in trying at once what needs room"


def test_the_end(world):
    wrong, lack, error = ValueError("too long"), PlacementError("needs 4 GPUs"), RuntimeError("boom")
    for one in (wrong, lack):
        replicas = world.make(1)
        with pytest.raises(type(one), match=str(one)):
            replicas.went_down(Down(replicas.alive[0], one, False), one)
    replicas = world.make(1)
    for _ in range(MOST_FAILURES - 1):
        replicas.went_down(Down(replicas.alive[0], error, False), error)
    with pytest.raises(NoEngineError, match="boom"):
        replicas.went_down(Down(replicas.alive[0], error, False), error)


def test_a_cluster_out_of_reach_leaves_engines_alone(world):
    replicas = world.make("auto")
    up(replicas)
    world.free = ConnectionError("no answer")
    tick(world, replicas)
    assert len(replicas.alive) == 1


def node(name, cpus=4, gpus=0, alive=True):
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


def find(monkeypatch, nodes, free, wanted, others=(), **engine):
    totals = {kind: sum(one["Resources"][kind] for one in nodes if one["Alive"]) for kind in ("CPU", "GPU")}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: totals)
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    return cluster.find_places(make_config(model="m", **engine), wanted, list(others))


def test_places_on_gpus(monkeypatch):
    nodes = [node("a", gpus=4), node("b", gpus=8), node("c", gpus=8, alive=False)]
    free = {"a": {"GPU": 3.0}, "b": {"GPU": 5.0}, "c": {"GPU": 8.0}}
    places = find(monkeypatch, nodes, free, None, tensor_parallel_size=2)
    assert [place.node_id for place in places] == ["b", "b", "a"]
    assert [place.node_id for place in find(monkeypatch, nodes, free, 2)] == ["b", "b"]
    taken = {"a": {"CPU": 4.0}, "b": {}}
    assert find(monkeypatch, nodes, taken, None) == []
    assert find(monkeypatch, nodes, taken, 2) == [Place(), Place()]
    with pytest.raises(ValueError, match="tensor_parallel_size=16"):
        find(monkeypatch, nodes, free, None, tensor_parallel_size=16)


def test_places_on_cpus(monkeypatch):
    nodes = [node("a"), node("b", cpus=8), node("head", cpus=0)]
    assert [place.node_id for place in find(monkeypatch, nodes, {}, None)] == ["a", "b"]
    assert find(monkeypatch, nodes, {}, None, [Place("a")]) == [Place("b")]
    assert find(monkeypatch, nodes, {}, None, [Place("a"), Place(None)]) == []
    four = find(monkeypatch, nodes, {}, 3)
    assert sorted((place.node_id, place.num_sharing) for place in four) == [("a", 1), ("b", 2), ("b", 2)]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "many", "0"])
def test_counts(value):
    with pytest.raises(ValueError, match=r'replicas must be a number from 1 on, or "auto", got'):
        check_count(value)
    assert (check_count("3"), check_count("auto"), check_count(2)) == (3, "auto", 2)
