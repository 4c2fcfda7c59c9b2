"""A small cluster to break: a head that nothing of a job's engines runs on, and nodes that come and go."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

# A node that is gone is noticed in about 3 s, one that is frozen in about 4; Ray's defaults take 14 and 65.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
STORE = 100 << 20


class Nodes:
    """The cluster, its worker nodes, and what can happen to them."""

    def __init__(self, processes):
        from ray.cluster_utils import Cluster

        self._processes = processes
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE, "_system_config": HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = []
        self.fill()

    def fill(self, count=2):
        """Until there are so many worker nodes."""
        while len(self.workers) < count:
            self.workers.append(self.cluster.add_node(num_cpus=2, object_store_memory=STORE))
        self.cluster.wait_for_nodes()

    @staticmethod
    def raylet(node):
        return node.all_processes["raylet"][0].process.pid

    def pids(self, node):
        """The raylet and all that it started."""
        return [self.raylet(node), *self._processes.descendants(self.raylet(node))]

    def holding(self, prefix):
        """A worker node that runs a process of that name; None where there is none."""
        return next((n for n in self.workers if self._processes.named(prefix, self.raylet(n))), None)

    def lose(self, node):
        """The machine is gone, and everything on it in the same moment."""
        self.workers.remove(node)
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)

    def signal(self, node, number):
        """SIGSTOP: it no longer answers. SIGCONT: it is back, and knows nothing of the time between."""
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def drop(self, node):
        """Of one that Ray has given up already."""
        self.workers.remove(node)
        with contextlib.suppress(Exception):  # it may have ended by itself
            self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="session")
def nodes(processes):
    made = Nodes(processes)
    yield made
    made.cluster.shutdown()


@pytest.fixture(scope="session")
def ray_cluster(nodes):
    """The tests' own process joins too: jobs ask it for the address."""
    import ray

    ray.init(address=nodes.cluster.address, logging_level="WARNING")
    yield
    ray.shutdown()


class Chaos:
    """Runs a job to its end while things die around it, starting the same command again whenever it dies itself."""

    KINDS = ("rank", "driver", "stage", "job", "node")

    def __init__(self, start, nodes, processes, rng):
        self._start, self._nodes, self._processes, self._rng = start, nodes, processes, rng
        self.kills = []  # kind, answers at that time
        self.runs = 0

    def run(self, source, num_kills, num_rows, *, timeout_s=600, kinds=KINDS, again=None, **fields):
        """The job, once it has completed. Kills come at random moments, spread over the job's rows."""
        deadline = time.monotonic() + timeout_s
        due = sorted(self._rng.uniform(0.02, 0.95) for _ in range(num_kills))
        while True:
            ran = self._start(source, **fields)
            self.runs += 1
            while ran.process.poll() is None:
                assert time.monotonic() < deadline, ran.log.read_text()[-5000:]
                time.sleep(self._rng.uniform(0.02, 0.3))
                done = len(ran.records("ok"))
                if len(self.kills) < num_kills and done >= due[len(self.kills)] * num_rows:
                    kind = self._rng.choice(kinds)
                    if self._kill(kind, ran):
                        self.kills.append((kind, done))
            if ran.process.returncode == 0:
                return ran
            assert self.kills, ran.log.read_text()[-5000:]
            assert self.kills[-1][0] in ("job", "node"), ran.log.read_text()[-5000:]

    def _kill(self, kind, ran):
        if kind == "job":
            ran.process.kill()
            ran.process.wait()
            return True
        if kind == "node":
            node = self._rng.choice(self._nodes.workers)
            self._nodes.lose(node)
            self._nodes.fill()
            return True
        pids = self.stages() if kind == "stage" else self._processes.named(NAMES[kind])
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._rng.choice(pids), signal.SIGKILL)
        return True

    def stages(self):
        """Workers that run tasks of Ray Data just now."""
        return [
            pid for pid in self._processes.named("ray::")
            if "Map" in (name := self._processes.title(pid)) or "Read" in name
        ]  # fmt: skip


NAMES = {"rank": ("ray::StubWorker", "ray::Worker"), "driver": ("ray::StubDriver", "ray::Driver")}


@pytest.fixture
def chaos(start, nodes, processes):
    """chaos(rng) -> Chaos"""
    nodes.fill()
    return lambda rng: Chaos(start, nodes, processes, rng)
