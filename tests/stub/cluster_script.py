"""Engines with stub ranks on three nodes of one machine: what was seen, as JSON, for tests/faults/test_cluster.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
import stub_ranks
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shoal import LLM, SamplingParams

# A node that is gone is noticed in about 3 s; Ray's default takes 14.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
PROMPTS = [[3 + i % 50, 4, 5 + i % 7] for i in range(64)]
PARAMS = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)


def make(model, **arguments):
    small = {"max_num_seqs": 8, "max_model_len": 256, "kv_cache_memory_bytes": 1 << 24, "restart_backoff_s": 0.2}
    return LLM(model, **{"device": "cuda", **small, **arguments})


def ids(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def places(llm):
    return ray.get(llm.llm_engine._driver.rank_places.remote())


def below(pid):
    """A process and all that it started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


class Inside:
    """An engine that is made within an actor whose placement group takes in what its actors start."""

    def run(self, model):
        import stub_ranks

        stub_ranks.install()
        with make(model, device="cpu", tensor_parallel_size=2) as llm:
            captured = ray.get(llm.llm_engine._driver.captured.remote())
            return captured, ids(llm.generate(PROMPTS[:4], PARAMS, use_tqdm=False))


def inside(model):
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    actor = ray.remote(num_cpus=1)(Inside).options(scheduling_strategy=strategy).remote()
    captured, tokens = ray.get(actor.run.remote(model))
    ray.kill(actor)
    remove_placement_group(group)
    return captured, tokens


def main() -> None:
    os.environ["SHOAL_STUB_STEP_S"] = "0.02"
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, num_gpus=2, object_store_memory=100 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="WARNING")
    stub_ranks.install()
    seen = {}
    model = stub_ranks.make_model(Path(tempfile.mkdtemp()))
    with make(model, tensor_parallel_size=2) as llm:
        seen["tp2"] = places(llm)
        seen["quiet"] = ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    began = time.monotonic()
    try:
        make(model, tensor_parallel_size=4)
    except RuntimeError as error:
        seen["refused"] = [type(error).__name__, str(error), time.monotonic() - began]
    with make(model, tensor_parallel_size=4, tensor_parallel_across_nodes=True) as llm:
        seen["across"] = places(llm)
    seen["inside"] = inside(model)

    with make(model, tensor_parallel_size=2) as llm:
        before = places(llm)
        victim = next(node for node in nodes if node.node_id == before[0][0])
        killed = []

        def lose():
            killed.append(time.monotonic())
            for pid in below(victim.all_processes["raylet"][0].process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        deaths, collect = [], llm.llm_engine.collect

        def noted(timeout):
            collected = collect(timeout)
            deaths.extend((time.monotonic(), death.reason) for death in collected.deaths)
            if killed and deaths and collected.finished and "healed" not in seen:
                seen["healed"] = time.monotonic() - killed[0]
            return collected

        llm.llm_engine.collect = noted
        threading.Timer(0.5, lose).start()
        seen["lost"] = ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
        seen["moved"], seen["revived"] = [before, places(llm)], llm.llm_engine._restarts.total
        seen["deaths"] = [(when - killed[0], reason) for when, reason in deaths]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and ray.available_resources().get("GPU") != 2.0:
        time.sleep(0.1)
    seen["gpus"] = ray.available_resources().get("GPU")
    seen["groups"] = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    ray.shutdown()
    cluster.shutdown()
    Path(sys.argv[1]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
