"""The gang of ranks: placement group, rank actors, the step channel, and news of their death.

Ray places, starts, watches and logs the ranks. Per-step messages do not travel as Ray calls: they go over one
authenticated socket a rank (a Unix socket on the driver's node, TCP on the node's Ray address elsewhere), as frames
that never involve pickle. `RayChannel` sends the same frames as plain actor calls: the fallback and the reference.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener, wait
from typing import Any, Protocol

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shoal.workers.actor import ERROR, RemoteWorker

_POLL_S = 0.5  # how often a silent channel looks whether the ranks still live


class RankDiedError(RuntimeError):
    """A rank's process is gone, or it failed in a step; the gang cannot go on."""


class PlacementError(RuntimeError):
    """The cluster cannot place the ranks."""


class StepChannel(Protocol):
    """Plans out to every rank, results back from the one that answers (the last stage's first), in order."""

    def send(self, step_id: int, frame: bytes) -> None:
        """Give every rank the frame."""
        ...

    def receive(self) -> bytes:
        """The next result, in the order of the plans. RankDiedError when none can come."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class SocketChannel:
    """One socket a rank. A rank that dies hangs up, which `receive` notices at once."""

    def __init__(self, ranks: Sequence[Any], same_node: Sequence[bool], answering: int) -> None:
        self._answering = answering
        secret = secrets.token_bytes(32)
        self._connections: dict[int, Connection] = {}
        for local in sorted(set(same_node)):
            family = "AF_UNIX" if local else "AF_INET"
            address = None if local else (ray.util.get_node_ip_address(), 0)
            with Listener(address, family, backlog=len(ranks), authkey=secret) as listener:
                calling = [
                    rank.run.remote("connect", listener.address, family, secret)
                    for rank, is_local in zip(ranks, same_node, strict=True)
                    if is_local == local
                ]
                for _ in calling:
                    connection = _accept(listener, calling)
                    self._connections[int(connection.recv_bytes())] = connection
                ray.get(calling)

    def send(self, step_id: int, frame: bytes) -> None:
        """Give every rank the frame."""
        for rank, connection in self._connections.items():
            try:
                connection.send_bytes(frame)
            except OSError as error:
                raise RankDiedError(f"rank {rank} hung up: {error}") from error

    def receive(self) -> bytes:
        """The next result; RankDiedError when a rank hangs up or reports an error."""
        while True:
            for ready in wait(list(self._connections.values())):
                rank = next(r for r, c in self._connections.items() if c is ready)
                try:
                    frame = ready.recv_bytes()  # type: ignore[union-attr]
                except (EOFError, OSError) as error:
                    raise RankDiedError(f"rank {rank} died (its step channel closed)") from error
                _raise_error(frame)
                if rank == self._answering:
                    return bytes(frame)

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections.values():
            connection.close()


class RayChannel:
    """Frames as plain actor calls; the ranks put them in order by step id."""

    def __init__(self, ranks: Sequence[Any], answering: int) -> None:
        self._ranks, self._answering = ranks, answering
        self._pending: list[list[Any]] = []

    def send(self, step_id: int, frame: bytes) -> None:
        """Give every rank the frame."""
        self._pending.append([rank.step.remote(step_id, frame) for rank in self._ranks])

    def receive(self) -> bytes:
        """The next result; RankDiedError when a rank died or reports an error."""
        try:
            answers = ray.get(self._pending.pop(0))
        except ray.exceptions.RayActorError as error:
            raise RankDiedError(f"a rank died: {error}") from error
        for answer in answers:
            _raise_error(answer)
        return bytes(answers[self._answering])

    def close(self) -> None:
        """Nothing to hang up."""


class WorkerGroup:
    """Placement group and rank actors of one replica. Created by the driver actor, which owns them.

    One bundle is one pipeline stage, so its tensor-parallel ranks are on one node; stages may be on several, packed as
    far as they fit. Rank r belongs to stage r // stage_size and is started in that stage's bundle: which node a bundle
    got never changes the order of ranks.
    """

    def __init__(
        self, sizes: tuple[int, int], device: str, timeout_s: float, env: dict[str, str], node_id: str | None = None
    ) -> None:
        """`sizes`: ranks of a stage (tensor_parallel_size), and stages (pipeline_parallel_size). `node_id`: the one
        node that may have them."""
        rank_needs = {"CPU": 0.01} | ({"GPU": 1} if device == "cuda" else {})
        self.stage_size, self.num_stages = sizes
        self.world_size = self.stage_size * self.num_stages
        self.device = device
        stage_needs = {name: need * self.stage_size for name, need in rank_needs.items()}
        selector = None if node_id is None else [{"ray.io/node-id": node_id}] * self.num_stages
        self._group = placement_group(
            [stage_needs] * self.num_stages,
            strategy="PACK",
            bundle_label_selector=selector,
        )
        try:
            if not self._group.wait(timeout_s):
                raise PlacementError(_what_is_missing(rank_needs, sizes, timeout_s, self._group))
            self.ranks = [self._start(rank, rank_needs, env) for rank in range(self.world_size)]
            self._watches = {
                rank.watch.options(concurrency_group="watch").remote(): i for i, rank in enumerate(self.ranks)
            }
            self.probes: list[dict[str, Any]] = self.run("probe", device)
        except BaseException:
            remove_placement_group(self._group)
            raise
        self._channel: StepChannel | None = None

    def _start(self, rank: int, needs: dict[str, float], env: dict[str, str]) -> Any:
        stage = rank // self.stage_size
        options: dict[str, Any] = {
            "num_cpus": needs["CPU"],
            "num_gpus": needs.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=stage),
        }
        if self.device == "cuda" and self.world_size > 1:  # ranks that share memory must see all GPUs of their host
            env = env | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        if env:
            options["runtime_env"] = {"env_vars": env}
        return RemoteWorker.options(**options).remote(rank)

    def setup(self, configs: Sequence[Any], processors: Any, timeout_s: float) -> list[dict[str, Any]]:
        """Join the ranks in a process group and load the weights; what each says of it."""
        address = ray.get(self.ranks[0].run.remote("free_address"))
        calls = [
            rank.run.remote("setup", config, processors, address, timeout_s)
            for rank, config in zip(self.ranks, configs, strict=True)
        ]
        return list(ray.get(calls))

    def open_channel(self, kind: str) -> StepChannel:
        """The step channel; plans may be sent after this."""
        answering = self.world_size - self.stage_size
        if kind == "ray":
            self._channel = RayChannel(self.ranks, answering)
        else:
            here = ray.get_runtime_context().get_node_id()
            self._channel = SocketChannel(self.ranks, [probe["node_id"] == here for probe in self.probes], answering)
        return self._channel

    def run(self, method: str, *args: Any) -> list[Any]:
        """The same method on every rank, between steps; results in rank order."""
        return list(ray.get([rank.run.remote(method, *args) for rank in self.ranks]))

    def run_payload(self, payload: Any, timeout_s: float | None) -> list[Any]:
        """A call whose arguments this process must not unpack (they may need torch): references to the results."""
        refs = [rank.run_payload.remote(payload) for rank in self.ranks]
        _, late = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)
        if late:
            raise TimeoutError(f"{len(late)} of {len(refs)} ranks did not answer within {timeout_s} s")
        return refs

    def dead_ranks(self) -> list[int]:
        """Ranks whose process is gone."""
        gone, _ = ray.wait(list(self._watches), num_returns=len(self._watches), timeout=0)
        return sorted(self._watches[ref] for ref in gone)

    def shutdown(self) -> None:
        """End the ranks and give their resources back."""
        if self._channel is not None:
            self._channel.close()
        closing = [rank.run.remote("close") for rank in self.ranks if rank is not None]
        ray.wait(closing, num_returns=len(closing), timeout=5)
        for rank in self.ranks:
            ray.kill(rank)
        remove_placement_group(self._group)


def _accept(listener: Listener, calling: list[Any]) -> Connection:
    """The next rank's connection; fails when the rank that should call has failed instead."""
    result: list[Connection | BaseException] = []

    def accept() -> None:
        try:
            result.append(listener.accept())
        except Exception as error:  # handed to the caller's thread
            result.append(error)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while thread.is_alive():
        thread.join(_POLL_S)
        done, _ = ray.wait(calling, num_returns=len(calling), timeout=0)
        for ref in done:
            ray.get(ref)  # raises what went wrong
        if time.monotonic() > deadline:
            raise RankDiedError("a rank did not open its step channel within 30 s")
    if isinstance(result[0], BaseException):
        raise RankDiedError(f"opening the step channel failed: {result[0]}") from result[0]
    return result[0]


def _raise_error(frame: bytes) -> None:
    if frame.startswith(ERROR):
        report = json.loads(frame[len(ERROR) :])
        raise RankDiedError(f"rank {report['rank']} failed in a step:\n{report['traceback']}")


def _what_is_missing(needs: dict[str, float], sizes: tuple[int, int], timeout_s: float, group: Any) -> str:
    """Why the ranks have no place, with the numbers."""
    stage_size, num_stages = sizes
    world_size = stage_size * num_stages
    total, free = ray.cluster_resources(), ray.available_resources()
    lines = [
        f"{name}: {world_size * need:g} needed, {free.get(name, 0):g} free of {total.get(name, 0):g}"
        for name, need in needs.items()
    ]
    state = placement_group_table(group).get("state", "unknown")
    return (
        f"the Ray cluster could not place {world_size} rank(s) of {needs}, {stage_size} on one node, "
        f"within {timeout_s:g} s "
        f"(placement group {state}; {'; '.join(lines)}; driver on {socket.gethostname()}, pid {os.getpid()}). "
        "Free resources, lower tensor_parallel_size or pipeline_parallel_size, or raise placement_timeout_s."
    )
