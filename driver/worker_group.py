"""The gang of ranks: placement group, rank actors, the step channel, and news of their death.

Ray places, starts, watches and logs the ranks. Per-step messages do not travel as Ray calls: they go over one
authenticated socket a rank (a Unix socket on the driver's node, TCP on the node's Ray address elsewhere), as frames
that never involve pickle. `RayChannel` sends the same frames as plain actor calls: the fallback and the reference.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener, wait
from typing import Any, Protocol

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from shoal.driver.config import EngineConfig
from shoal.driver.log import LOGGER
from shoal.driver.placement import RANK_CPUS, reserve
from shoal.workers.actor import ERROR, RemoteWorker
from shoal.workers.host import kill_processes

SOCKET_FOLDER = "shoal-socket-"
_POLL_S = 0.5  # how often a silent channel looks whether the ranks still live
_GRACE_S = 2.0  # in which Ray ends a process that runs
_KILL_S = 10.0  # in which the kernel ends one that was killed


class RankDiedError(RuntimeError):
    """A rank's process is gone, or it failed in a step; the gang cannot go on."""


class StepMemoryError(RankDiedError):
    """A step needed more memory than a rank has. The rank lives, but what the step was to change is lost."""

    def __init__(self, message: str, step_id: int) -> None:
        super().__init__(message)
        self.step_id = step_id


class StepChannel(Protocol):
    """Plans out to every rank, results back from the one that answers (the last stage's first), in order."""

    def send(self, step_id: int, frame: bytes) -> None:
        """Give every rank the frame."""
        ...

    def receive(self) -> bytes:
        """The next result, in the order of the plans. RankDiedError when none can come."""
        ...

    def abandon(self) -> None:
        """From another thread: `send` and `receive` raise RankDiedError from now on, those under way too."""
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
            # A folder of our own: the one that Listener would make is left behind by a process that is killed.
            with (
                tempfile.TemporaryDirectory(prefix=SOCKET_FOLDER) as folder,
                Listener(
                    os.path.join(folder, "s") if local else (ray.util.get_node_ip_address(), 0),
                    family,
                    backlog=len(ranks),
                    authkey=secret,
                ) as listener,
            ):
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

    def abandon(self) -> None:
        """Ends the connections on this side, which wakes whoever waits, even where the other side is out of reach."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
                same.shutdown(socket.SHUT_RDWR)

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

    def abandon(self) -> None:
        """Calls of actors that were killed raise by themselves."""

    def close(self) -> None:
        """Nothing to hang up."""


class WorkerGroup:
    """Placement group and rank actors of one replica. Created by the driver actor, which owns them.

    One bundle is one pipeline stage, so its tensor-parallel ranks are on one node (with tensor_parallel_across_nodes
    one bundle is one rank); bundles may be on several, packed as far as they fit. Rank r belongs to stage
    r // stage_size and has its place in that order: which node a bundle got never changes the order of ranks.
    """

    def __init__(self, config: EngineConfig, device: str, env: dict[str, str], node_id: str | None = None) -> None:
        """`node_id`: the one node that may have all ranks."""
        rank_needs = {"CPU": RANK_CPUS} | ({"GPU": 1} if device == "cuda" else {})
        self.stage_size, self.num_stages = config.tensor_parallel_size, config.pipeline_parallel_size
        self.world_size = self.stage_size * self.num_stages
        self.device = device
        self._bundle_size = 1 if config.tensor_parallel_across_nodes else self.stage_size
        bundle = {name: need * self._bundle_size for name, need in rank_needs.items()}
        self._channel: StepChannel | None = None
        self._group = reserve(
            bundle,
            self.world_size // self._bundle_size,
            config.placement_timeout_s,
            config.wait_for_nodes,
            node_id,
        )
        try:
            self.ranks = [self._start(rank, rank_needs, env) for rank in range(self.world_size)]
            self._watches = {rank.watch.remote(): i for i, rank in enumerate(self.ranks)}
            self.probes: list[dict[str, Any]] = self.run("probe", device)
        except BaseException:
            remove_placement_group(self._group)
            raise

    def _start(self, rank: int, needs: dict[str, float], env: dict[str, str]) -> Any:
        bundle = rank // self._bundle_size
        options: dict[str, Any] = {
            "num_cpus": needs["CPU"],
            "num_gpus": needs.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        }
        if self.device == "cuda" and self.world_size > 1:  # ranks that share memory must see all GPUs of their host
            env = env | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        if env:
            options["runtime_env"] = {"env_vars": env}
        return RemoteWorker.options(**options).remote(rank)

    def setup(self, configs: Sequence[Any], processors: Any, timeout_s: float) -> list[dict[str, Any]]:
        """Join the ranks in a process group and load the weights; what each says of it."""
        (address,) = self._gather([self.ranks[0].run.remote("free_address")])
        calls = [
            rank.run.remote("setup", config, processors, address, timeout_s)
            for rank, config in zip(self.ranks, configs, strict=True)
        ]
        return self._gather(calls)

    def open_channel(self, kind: str) -> StepChannel:
        """The step channel; plans may be sent after this. Its secret is its own: no other epoch's ranks can call."""
        answering = self.world_size - self.stage_size
        if kind == "ray":
            self._channel = RayChannel(self.ranks, answering)
        else:
            here = ray.get_runtime_context().get_node_id()
            self._channel = SocketChannel(self.ranks, [probe["node_id"] == here for probe in self.probes], answering)
        return self._channel

    def run(self, method: str, *args: Any) -> list[Any]:
        """The same method on every rank, between steps; results in rank order."""
        return self._gather([rank.run.remote(method, *args) for rank in self.ranks])

    def run_payload(self, payload: Any, timeout_s: float | None) -> list[Any]:
        """A call whose arguments this process must not unpack (they may need torch): references to the results."""
        refs = [rank.run_payload.remote(payload) for rank in self.ranks]
        _, late = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)
        if late:
            raise TimeoutError(f"{len(late)} of {len(refs)} ranks did not answer within {timeout_s} s")
        return refs

    def wait_for_death(self, timeout_s: float) -> str | None:
        """Which ranks' processes are gone, in words, as soon as one is."""
        gone, _ = ray.wait(list(self._watches), num_returns=1, timeout=timeout_s)
        if not gone:
            return None
        gone, _ = ray.wait(list(self._watches), num_returns=len(self._watches), timeout=0)
        return "; ".join(f"{self._name(self._watches[ref])} died: {_reason(ref)}" for ref in gone)

    def give_up(self) -> None:
        """End the ranks, and wake whoever waits for them, whether they can be reached or not."""
        self.kill()
        if self._channel is not None:
            self._channel.abandon()

    def kill(self) -> None:
        """End the ranks' processes for good, stopped ones too; return when those that can be reached are gone."""
        for rank in self.ranks:
            ray.kill(rank)
        end_processes(getattr(self, "probes", []))

    def discard(self) -> None:
        """End the ranks without asking them, and give their resources back."""
        if self._channel is not None:
            self._channel.close()
        self.kill()
        remove_placement_group(self._group)

    def shutdown(self) -> None:
        """End the ranks and give their resources back."""
        if self._channel is not None:
            self._channel.close()
        closing = [rank.run.remote("close") for rank in self.ranks]
        _, late = ray.wait(closing, num_returns=len(closing), timeout=5)
        if late:
            self.discard()
            return
        for rank in self.ranks:  # those that answer end when Ray tells them to, on whatever node
            ray.kill(rank)
        here = ray.get_runtime_context().get_node_id()
        end_processes([probe for probe in self.probes if probe["node_id"] == here])
        remove_placement_group(self._group)

    def _gather(self, calls: list[Any]) -> list[Any]:
        """Results in rank order; the first error of any rank at once, since the others may wait for that one."""
        left = list(calls)
        while left:
            done, left = ray.wait(left, num_returns=1)
            ray.get(done)
        return list(ray.get(calls))

    def _name(self, rank: int) -> str:
        probes: list[dict[str, Any]] = getattr(self, "probes", [])
        return f"rank {rank} (pid {probes[rank]['pid']} on {probes[rank]['node_ip']})" if probes else f"rank {rank}"


def end_actor(actor: Any, process: dict[str, Any]) -> None:
    """End an actor for good, one whose process is stopped too."""
    ray.kill(actor)
    end_processes([process])


def end_processes(processes: Sequence[dict[str, Any]]) -> None:
    """See that processes (as `whereabouts` told of them) end, on whatever node, and wait for it."""
    here = ray.get_runtime_context().get_node_id()
    by_node: dict[str, list[tuple[int, int | None]]] = {}
    for one in processes:
        by_node.setdefault(one["node_id"], []).append((one["pid"], one["born"]))
    left = kill_processes(by_node.pop(here, []), _GRACE_S, _KILL_S)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if by_node else set()
    calls = [
        _kill_there.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(them)
        for node, them in by_node.items()
        if node in alive  # else they are gone with it, or out of reach
    ]
    done, late = ray.wait(calls, num_returns=len(calls), timeout=_KILL_S) if calls else ([], [])
    for call in done:
        try:
            left += ray.get(call)
        except ray.exceptions.RayError as error:  # the node is gone, and the processes with it
            LOGGER.warning("processes of a lost node could not be ended there: %s", str(error).splitlines()[0])
    if left or late:
        LOGGER.error("processes %s and those of %d node(s) may still live", left, len(late))


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _kill_there(processes: list[tuple[int, int | None]]) -> list[int]:
    return kill_processes(processes, _GRACE_S, _KILL_S)


def _reason(watch: Any) -> str:
    """Why a call that never returns did."""
    try:
        ray.get(watch)
    except ray.exceptions.RayError as error:
        return " ".join(str(error).split())[:300]
    return "it returned from its watch"


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
        message = f"rank {report['rank']} failed in a step:\n{report['traceback']}"
        raise StepMemoryError(message, report["step_id"]) if report["out_of_memory"] else RankDiedError(message)
