"""Placement on a cluster of three nodes, and the loss of one: a script of its own, since this process has its Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "stub" / "cluster_script.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the script saw."""
    path = tmp_path_factory.mktemp("cluster") / "seen.json"
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    root = str(SCRIPT.parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, str(SCRIPT.parent), *filter(None, [env.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-5000:]
    found = json.loads(path.read_text())
    print({key: value for key, value in found.items() if key not in ("quiet", "lost", "inside")})
    return found


def test_ranks_of_a_stage_share_a_node(seen):
    nodes, gpus = zip(*seen["tp2"], strict=True)
    assert len(set(nodes)) == 1
    assert sorted(gpu for one in gpus for gpu in one) == [0, 1], "each its own"
    nodes = [node for node, _ in seen["across"]]
    assert len(nodes) == 4
    assert len(set(nodes)) == 2, "where the user allows it, they may be on several"


def test_what_can_never_fit_is_refused(seen):
    kind, message, seconds = seen["refused"]
    assert kind == "PlacementError"
    assert seconds < 30
    assert "1 x (0.04 CPU, 4 GPU), each on one node, of 3 nodes" in message
    assert "GPU: 4 needed, 4 free of 4" in message
    assert "The nodes hold 0 of 1 even when idle: the most that one has is 2 CPU, 2 GPU" in message


def test_an_engine_inside_an_actor_keeps_out_of_its_group(seen):
    captured, tokens = seen["inside"]
    assert not captured
    assert tokens == seen["quiet"][:4]


def test_a_lost_node_loses_no_row(seen):
    assert seen["lost"] == seen["quiet"]
    before, after = seen["moved"]
    assert {node for node, _ in before}.isdisjoint({node for node, _ in after})
    assert seen["deaths"] or seen["revived"], "it did happen while rows were at work; the driver may have been there"
    assert all(seconds < 30 for seconds, _ in seen["deaths"])


def test_engines_give_their_places_back(seen):
    assert seen["gpus"] == 2.0, "those of the node that is left"
    assert seen["groups"] == []
