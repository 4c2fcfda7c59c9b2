"""Jobs on real Ray processes: driver actor, scheduler and step channel as they are, ranks that make tokens up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STUB = Path(__file__).resolve().parents[1] / "stub"


class Ran:
    """A job that was run, or is running, with its files."""

    def __init__(self, output):
        self.output, self.code, self.process = str(output), None, None

    @property
    def state(self):
        return Path(self.output.rstrip("/") + ".shoal" if not self.output.endswith("/") else f"{self.output}_shoal")

    def rows(self, path=None):
        with open(path or self.output, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def report(self):
        return json.loads((self.state / "report.json").read_text())

    def status(self):
        path = self.state / "status.json"
        return json.loads(path.read_text()) if path.exists() else None

    def records(self, kind):
        """Metas of all records of one kind that are part of the ledger, of every epoch."""
        seals = sorted(self.state.glob("seal-*.json"))
        sealed = json.loads(seals[-1].read_text())["parts"] if seals else {}
        found = []
        for path in sorted(self.state.glob("ledger-*.jsonl")):
            lines = path.read_bytes()[: sealed.get(path.name)].splitlines()  # what came after its seal does not count
            metas = [json.loads(line[9:].split(b"\t")[0]) for line in lines]
            found += [meta for meta in metas if meta["t"] == kind]
        return found

    def wait_for(self, count, timeout=60):
        """Until so many answers are in the ledger."""
        deadline = time.monotonic() + timeout
        while len(self.records("ok")) < count:
            assert time.monotonic() < deadline, f"{len(self.records('ok'))} rows after {timeout} s, not {count}"
            assert self.process is None or self.process.poll() is None, "the job has ended"
            time.sleep(0.05)

    def end(self, timeout=90):
        self.code = self.process.wait(timeout)
        return self.code


@pytest.fixture(scope="session")
def load_job():
    """load_job(output) -> Ran"""
    return Ran


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(rows, name) -> path of a JSONL file."""

    def write(rows, name="in.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def fields(stub_model, tmp_path):
    """fields(source, **changes) -> the fields of a job with small engines."""

    def make(source, **changes):
        small = {"model": stub_model, "max_num_seqs": 8, "max_model_len": 256, "restart_backoff_s": 0.05}
        engine = small | changes.pop("engine", {})
        sampling = {"max_tokens": 8, "ignore_eos": True}
        made = {"input": source, "output": str(tmp_path / "out.jsonl"), "sampling_params": sampling, "engine": engine}
        return made | changes

    return make


@pytest.fixture
def run(ray_cluster, stub_ranks, fields, monkeypatch):
    """run(source, **fields) -> Ran, in this process."""
    from shoal.driver import engine
    from shoal.driver.jobs.config import make_job
    from shoal.driver.jobs.job import run_job

    before = stub_ranks.install()
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.001")

    def call(source, **changes):
        made = fields(source, **changes)
        ran = Ran(made["output"])
        ran.code = run_job(make_job(made))
        return ran

    yield call
    engine.RemoteDriver = before


class Forged:
    """A job's process, as subprocess.Popen would have it."""

    def __init__(self, ask, *start):
        self._ask, self.returncode = ask, None
        self.pid = ask(start=start)

    def poll(self):
        if self.returncode is None:
            self.returncode = self._ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"the job has not ended within {timeout} s"
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def forge():
    """forge(arguments, environment, log) -> Forged: a stub job in a process of its own."""
    command = [sys.executable, str(STUB / "job_forge.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(**request):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield lambda *start: Forged(ask, *start)
        process.stdin.close()


@pytest.fixture
def start(ray_cluster, fields, forge, tmp_path):
    """start(source, stub=..., **fields) -> Ran whose process has been started and joins the tests' cluster.

    `forked=False`: with a Python of its own, from its first line on.
    """
    import ray
    import yaml

    processes = []

    def call(source, *, stub=True, forked=True, env=(), **changes):
        made = fields(source, **changes)
        path = tmp_path / f"job-{len(processes)}.yaml"
        path.write_text(yaml.safe_dump(made))
        ran = Ran(made["output"])
        ran.log = path.with_suffix(".log")
        arguments = ["run-batch", str(path), "--address", ray.get_runtime_context().gcs_address]
        environment = {**os.environ, "SHOAL_STUB_STEP_S": "0.01", **dict(env)}
        if stub and forked:
            ran.process = forge(arguments, environment, str(ran.log))
        else:
            command = [sys.executable, *([str(STUB / "stub_cli.py")] if stub else ["-m", "shoal"]), *arguments]
            with ran.log.open("w") as log:
                ran.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        processes.append(ran.process)
        return ran

    yield call
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
