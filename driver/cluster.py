"""What the Ray cluster has room for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import ray

from shoal.driver.replica import Place
from shoal.driver.resolve import pick_device

if TYPE_CHECKING:
    from shoal.driver.config import EngineConfig


def find_places(config: EngineConfig, wanted: int | None, others: list[Place]) -> list[Place]:
    """Where engines can go now: see `FindPlaces`. ValueError where not even an empty cluster could hold one.

    On GPUs: as many as have their GPUs free on one node. On CPUs, where engines use all cores of a node: one for each
    node, or, for a fixed number, shared out evenly.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if pick_device(config, ray.cluster_resources()) == "cuda":
        places = _gpu_places(nodes, config.tensor_parallel_size, config.pipeline_parallel_size)
    else:
        places = _cpu_places(nodes, wanted, others)
    if wanted is None:
        return places
    return places[:wanted] + [Place()] * (wanted - len(places))


def _gpu_places(nodes: list[dict[str, Any]], stage_size: int, num_stages: int) -> list[Place]:
    """Nodes by their free GPUs. Stages may be on several nodes: then only Ray can say which."""
    from ray._private.state import available_resources_per_node  # there is no public way to ask for single nodes

    free = available_resources_per_node()
    stages = {node["NodeID"]: int(free.get(node["NodeID"], {}).get("GPU", 0)) // stage_size for node in nodes}
    places = []
    for node_id, count in sorted(stages.items(), key=lambda pair: -pair[1]):
        places += [Place(node_id)] * (count // num_stages)
    return places


def _cpu_places(nodes: list[dict[str, Any]], wanted: int | None, others: list[Place]) -> list[Place]:
    cores = {node["NodeID"]: float(node["Resources"]["CPU"]) for node in nodes}
    used = Counter(place.node_id for place in others if place.node_id in cores)
    unknown = len(others) - used.total()  # replaced ones: somewhere
    if wanted is None:
        return [Place(node_id) for node_id in cores if not used[node_id]][: max(0, len(cores) - len(others))]
    if not cores:
        return []
    chosen = []
    for _ in range(wanted):
        node_id = min(cores, key=lambda one: (used[one] + 1) / cores[one])
        used[node_id] += 1
        chosen.append(node_id)
    return [Place(node_id, used[node_id] + (unknown if len(cores) == 1 else 0)) for node_id in chosen]
