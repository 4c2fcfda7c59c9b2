"""Waiting for places: how long, with what words, and that nothing is left reserved. No Ray."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import pytest

from shoal.driver import placement
from shoal.driver.placement import PlacementError, reserve, wait_for_cpus
from shoal.driver.resolve import pick_device


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of 2 GPUs, all taken; `granted_after` seconds the group gets its place."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 4.0, "GPU": 8.0}},
    ]
    state = SimpleNamespace(granted_after=1e9, removed=[], asked=None)

    class Group:
        began = time.monotonic()

        def wait(self, seconds):
            time.sleep(0.01)
            return time.monotonic() - self.began > state.granted_after

    def make(bundles, strategy, **_):
        state.asked = (bundles, strategy)
        return Group()

    context = SimpleNamespace(get_actor_id=lambda: "a0")
    monkeypatch.setattr(placement.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(placement, "placement_group_table", dict)

    monkeypatch.setattr(placement, "placement_group", make)
    monkeypatch.setattr(placement, "remove_placement_group", state.removed.append)
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})
    monkeypatch.setattr(placement.ray, "available_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    monkeypatch.setattr(placement, "IMPOSSIBLE_S", 0.2)
    return state


BUNDLE = {"CPU": 0.04, "GPU": 4}


def test_what_no_node_can_hold_is_refused_soon(cluster):
    began = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        reserve(BUNDLE, 1, 30, wait_for_nodes=False)
    assert time.monotonic() - began < 5
    message = str(caught.value)
    assert "1 x (0.04 CPU, 4 GPU), each on one node, of 2 nodes" in message
    assert "GPU: 4 needed, 1 free of 4" in message
    assert "The nodes hold 0 of 1 even when idle: the most that one has is 4 CPU, 2 GPU" in message
    assert len(cluster.removed) == 1


def test_a_cluster_that_grows_is_waited_for(cluster):
    with pytest.raises(PlacementError, match="within 1 s"):
        reserve(BUNDLE, 1, 0.8, wait_for_nodes=True)
    cluster.granted_after = 0.5
    reserve(BUNDLE, 1, 30, wait_for_nodes=True)
    assert len(cluster.removed) == 1


def test_what_is_taken_is_waited_for_aloud(cluster, monkeypatch, caplog):
    monkeypatch.setattr(placement, "_REMIND_S", 0.1)
    monkeypatch.setattr(placement.LOGGER, "propagate", True)
    with (
        caplog.at_level(logging.WARNING, placement.LOGGER.name),
        pytest.raises(PlacementError, match="They would fit, but what they need is taken"),
    ):
        reserve({"CPU": 0.02, "GPU": 2}, 2, 1.0, wait_for_nodes=False)
    assert "waiting for places since " in caplog.text
    assert "GPU: 4 needed, 1 free of 4" in caplog.text
    assert cluster.asked == ([{"CPU": 0.02, "GPU": 2}] * 2, "PACK")


def test_an_interrupt_leaves_no_group(cluster, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(placement, "_lack", lambda *_: interrupt(0))
    with pytest.raises(KeyboardInterrupt):
        reserve(BUNDLE, 1, 30, wait_for_nodes=False)
    assert len(cluster.removed) == 1


def test_gpus_that_may_come_are_not_refused_at_once():
    from shoal.driver.config import make_config

    waiting = make_config(model="m", device="cuda", tensor_parallel_size=2, wait_for_nodes=True)
    assert pick_device(waiting, {}) == "cuda"
    with pytest.raises(ValueError, match="the Ray cluster has 0"):
        pick_device(make_config(model="m", device="cuda", tensor_parallel_size=2), {})


def test_groups_of_dead_drivers_are_given_back(cluster, monkeypatch):
    table = {
        "aa" * 18: {"name": "shoal-driver-d0-1", "state": "CREATED"},
        "bb" * 18: {"name": "shoal-driver-d1-1", "state": "CREATED"},
        "cc" * 18: {"name": "somebody's", "state": "CREATED"},
        "dd" * 18: {"name": "shoal-driver-d0-2", "state": "REMOVED"},
    }
    monkeypatch.setattr(placement, "placement_group_table", lambda: table)
    states = {"d0": {"State": "DEAD"}, "d1": {"State": "ALIVE"}}
    monkeypatch.setattr(placement.ray._private.state, "actors", states.__getitem__)
    placement.remove_orphans()
    assert [group.id.hex() for group in cluster.removed] == ["aa" * 18]


PARTS = [("to read", [0.25]), ("to tokenize", [0.5]), ("for 2 engines", [0.02, 0.02])]


def test_cpus_that_are_free_are_not_asked_for(cluster):
    wait_for_cpus("the job", PARTS, 30, wait_for_nodes=False)
    assert cluster.asked is None


def test_cpus_that_others_hold_are_waited_for(cluster, monkeypatch):
    """CPUs of the whole cluster would be enough, and tasks would wait for them without a word, and without an end."""
    monkeypatch.setattr(placement.ray, "available_resources", lambda: {"CPU": 0.3})
    said = (
        r"the job needs 0\.79 CPUs: 0\.25 to read, 0\.5 to tokenize, 0\.04 for 2 engines; "
        r"the Ray cluster has 8 in all, 0\.3 of them free, after \d+ s of waiting"
    )
    with pytest.raises(PlacementError, match=said):
        wait_for_cpus("the job", PARTS, 0.2, wait_for_nodes=False)
    assert cluster.asked == ([{"CPU": 0.25}, {"CPU": 0.5}, {"CPU": 0.02}, {"CPU": 0.02}], "PACK")
    assert len(cluster.removed) == 1
    wait_for_cpus("the job", PARTS, 30, wait_for_nodes=False, stopped=lambda: True)
    cluster.granted_after = 0.0
    wait_for_cpus("the job", PARTS, 30, wait_for_nodes=False)
    assert len(cluster.removed) == 3, "what was waited for is given back to those who need it"


def test_cpus_that_the_cluster_lacks(cluster, monkeypatch):
    many = [("for engines", [9.0])]
    with pytest.raises(PlacementError, match="the job needs 9 CPUs: 9 for engines; the Ray cluster has 8 in all"):
        wait_for_cpus("the job", many, 30, wait_for_nodes=False)
    assert cluster.asked is None, "at once"
    cluster.granted_after = 0.3
    wait_for_cpus("the job", many, 30, wait_for_nodes=True)
