"""Engines that come and go leave nothing: no process, actor, placement group, shared memory, port or file."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from pathlib import Path

import pytest

from shoal import LLM, SamplingParams
from shoal.driver.worker_group import SOCKET_FOLDER

PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def named_after_actors() -> list[str]:
    """Processes that are an actor of ours: Ray names a worker's process after its actor."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes().split(b"\0")[0].decode("utf-8", "replace")
            parent = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if title.startswith(("ray::Driver", "ray::Worker")) and int(parent) in descendants(os.getpid()):
            found.append(title)
    return found


def descendants(pid: int) -> set[int]:
    """This process and all below it, by /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def sockets(pids: set[int]) -> int:
    """Sockets on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:] + Path("/proc/net/unix").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    listening = {row[9] for row in rows if len(row) > 9 and row[3] == "0A"}  # TCP
    listening |= {row[6] for row in rows if len(row) > 6 and row[3] == "00010000"}  # Unix
    return len(inodes & listening)


def state() -> dict[str, object]:
    """What an engine could leave."""
    import ray
    from ray.util import placement_group_table

    return {
        "groups": [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"],
        "cpus": ray.available_resources().get("CPU"),
        "actors": named_after_actors(),
        "shared memory": sorted(n for n in os.listdir("/dev/shm") if not n.startswith("plasma")),
        "files": [n for n in os.listdir(tempfile.gettempdir()) if n.startswith(SOCKET_FOLDER)],
        "listening sockets": sockets(descendants(os.getpid())),
        "own descriptors": len(os.listdir("/proc/self/fd")),
    }


LOOSE = ("own descriptors", "listening sockets")  # Ray keeps a few idle workers ready


def run_rounds(folder: str, rounds: int, **arguments: object) -> None:
    expected, before = None, None
    for number in range(rounds + 1):  # the first one warms up: workers that Ray keeps, its connections
        with LLM(folder, dtype="float32", max_num_seqs=4, max_model_len=64, **arguments) as llm:
            tokens = [list(o.outputs[0].token_ids) for o in llm.generate([[3, 4, 5]], PARAMS, use_tqdm=False)]
        assert tokens == (expected := expected or tokens)
        now = settle(before)
        before = before or now
        for name, value in now.items():
            if name in LOOSE:
                assert value <= before[name] + 8, f"{name} after round {number}: {before[name]}, then {value}"
            else:
                assert value == before[name], f"{name} after round {number}"
        if number % 10 == 0:
            print(f"after {number} rounds: {now}", flush=True)
    assert not now["actors"] + now["groups"] + now["files"]


def settle(before: dict[str, object] | None) -> dict[str, object]:
    """The state, once what ends has ended."""
    import ray

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        gc.collect()  # what failed in other tests: exceptions and their frames hold handles of Ray Data's actors
        now = state()
        done = not (now["actors"] or now["groups"] or now["files"]) and now["cpus"] == ray.cluster_resources()["CPU"]
        if done and (before is None or now["shared memory"] == before["shared memory"]):
            break
        time.sleep(0.1)
    return now


def test_engines_leave_nothing(ray_cluster, tiny_checkpoint) -> None:
    run_rounds(tiny_checkpoint("llama"), 2, tensor_parallel_size=2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_engines_leave_nothing(ray_cluster, tiny_checkpoint) -> None:
    run_rounds(tiny_checkpoint("llama"), 100)
