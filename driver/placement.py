"""Where ranks go: one placement group for a replica, and words for why there is no place."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from shoal.driver.log import LOGGER

RANK_CPUS = 0.01  # ranks wait for the GPU, or use the cores that the node has
IMPOSSIBLE_S = 10.0  # how long what no node could hold is waited for: a node may just be joining
_REMIND_S = 10.0
_OWNED = "shoal-driver-"  # and the driver's actor id: name of its placement groups


class PlacementError(RuntimeError):
    """The cluster cannot place the ranks."""


def reserve(
    bundle: dict[str, float], count: int, timeout_s: float, wait_for_nodes: bool, node_id: str | None = None
) -> PlacementGroup:
    """A placement group of `count` equal bundles, packed onto as few nodes as hold them, or all on the node `node_id`.

    PlacementError, which says what is missing, after `timeout_s` seconds; after IMPOSSIBLE_S where the nodes that there
    are could not hold the bundles if they were empty, unless `wait_for_nodes`. While it waits, the log says for what.
    """
    began, since = time.monotonic(), time.strftime("%H:%M:%S")
    remove_orphans()
    owner = ray.get_runtime_context().get_actor_id()
    name = f"{_OWNED}{owner}-{uuid.uuid4().hex[:8]}" if owner else ""
    selector = None if node_id is None else [{"ray.io/node-id": node_id}] * count
    group = placement_group([bundle] * count, strategy="PACK", name=name, bundle_label_selector=selector)
    reminded = 0.0
    try:
        while not group.wait(0.5):
            waited = time.monotonic() - began
            lack = _lack(bundle, count)
            impossible = not wait_for_nodes and _places(bundle, "Resources") < count and waited > IMPOSSIBLE_S
            if waited > timeout_s or impossible:
                raise PlacementError(
                    f"the Ray cluster could not place the ranks within {waited:.0f} s: {lack} (driver on "
                    f"{socket.gethostname()}, pid {os.getpid()}). Free resources, add nodes, lower "
                    "tensor_parallel_size or pipeline_parallel_size, or raise placement_timeout_s."
                )
            if waited - reminded > _REMIND_S:
                reminded = waited
                LOGGER.warning("waiting for places since %s: %s", since, lack)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def wait_for_cpus(
    who: str,
    parts: Sequence[tuple[str, Sequence[float]]],
    timeout_s: float,
    wait_for_nodes: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Waits until the CPUs are free that `who` needs at once, or until `stopped`. Holds none of them afterwards.

    `parts`: (for what, the CPUs of each of its tasks or actors). PlacementError, which says what is missing, after
    `timeout_s` seconds; at once where the cluster has not so many in all, unless `wait_for_nodes`.
    """
    bundles = [cpus for _, part in parts for cpus in part]
    needed = sum(bundles) - 1e-6  # sums of hundredths
    if _cpus(ray.available_resources()) >= needed:
        return
    if _cpus(ray.cluster_resources()) < needed and not wait_for_nodes:
        raise PlacementError(f"{_short_of_cpus(who, parts)}. Add nodes or CPUs")
    began = time.monotonic()
    LOGGER.warning("waiting for CPUs: %s", _short_of_cpus(who, parts))
    group = placement_group([{"CPU": cpus} for cpus in bundles], strategy="PACK")  # asked for: a cluster may grow then
    try:
        while not group.wait(0.5):
            if stopped():
                return
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise PlacementError(
                    f"{_short_of_cpus(who, parts)}, after {waited:.0f} s of waiting. Free CPUs, add nodes, or raise "
                    "placement_timeout_s"
                )
    finally:
        remove_placement_group(group)


def _short_of_cpus(who: str, parts: Sequence[tuple[str, Sequence[float]]]) -> str:
    needed = sum(sum(part) for _, part in parts)
    listed = ", ".join(f"{sum(part):g} {what}" for what, part in parts)
    free, total = _cpus(ray.available_resources()), _cpus(ray.cluster_resources())
    return f"{who} needs {needed:g} CPUs: {listed}; the Ray cluster has {total:g} in all, {free:g} of them free"


def _cpus(resources: dict[str, float]) -> float:
    return float(resources.get("CPU", 0.0))


def remove_orphans() -> None:
    """Give back what drivers reserved that are dead: Ray keeps the groups of a dead actor until its job ends."""
    for key, group in placement_group_table().items():
        name = str(group.get("name", ""))
        if not name.startswith(_OWNED) or group["state"] == "REMOVED":
            continue
        owner = ray._private.state.actors(name.removeprefix(_OWNED).split("-")[0])
        if owner.get("State", "DEAD") == "DEAD":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))
            LOGGER.warning("removed the placement group of a driver that died: %s", name)


def _places(bundle: dict[str, float], key: str) -> int:
    """Bundles that the living nodes hold."""
    return sum(_fits(bundle, node[key]) for node in ray.nodes() if node["Alive"])


def _fits(bundle: dict[str, float], resources: dict[str, float]) -> int:
    return min(int((resources.get(name, 0.0) + 1e-6) // need) for name, need in bundle.items())


def _lack(bundle: dict[str, float], count: int) -> str:
    """What the bundles need, what there is, and which of it stands in the way."""
    needs = ", ".join(f"{need:g} {name}" for name, need in bundle.items())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total, free = ray.cluster_resources(), ray.available_resources()
    sums = "; ".join(
        f"{name}: {need * count:g} needed, {free.get(name, 0):g} free of {total.get(name, 0):g}"
        for name, need in bundle.items()
    )
    text = f"{count} x ({needs}), each on one node, of {len(nodes)} nodes. {sums}"
    held = _places(bundle, "Resources")
    if held >= count:
        return f"{text}. They would fit, but what they need is taken"
    largest: dict[str, Any] = {
        name: max((node["Resources"].get(name, 0.0) for node in nodes), default=0.0) for name in bundle
    }
    most = ", ".join(f"{value:g} {name}" for name, value in largest.items())
    return f"{text}. The nodes hold {held} of {count} even when idle: the most that one has is {most}"
