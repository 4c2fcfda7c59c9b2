"""`ray job submit` against a `ray start --head` with token authentication: logs, metrics, `ray job stop`, resuming."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from shoal.driver.telemetry import METRICS, exported_names

ROOT = Path(__file__).resolve().parents[2]
STUB_CLI = ROOT / "tests" / "stub" / "stub_cli.py"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# Counters that stay at nothing in a job where nothing goes wrong have no series.
AT_NOTHING = {
    "shoal_engine_preemptions", "shoal_engine_wasted_tokens", "shoal_engine_prefix_cache_hit_tokens",
    "shoal_job_engine_deaths", "shoal_job_quarantined_rows", "shoal_job_errors",
}  # fmt: skip


def free_ports(count):
    """Below the range that systems give out by themselves, and not where Ray's workers listen (10002 to 19999)."""
    found, port = [], 20000 + os.getpid() % 9000
    while len(found) < count:
        port += 1
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


class Head:
    """A one-node cluster of its own."""

    def __init__(self, folder):
        self.temp = tempfile.mkdtemp(prefix="shoal-head-", dir="/tmp")  # short: sockets are in it
        gcs, self.dashboard, self.metrics, client, listen, grpc = free_ports(6)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_JOB_STOP_WAIT_TIME_S": "45",
            "RAY_metrics_report_interval_ms": "1000",
            "PYTHONPATH": str(ROOT),
            "SHOAL_STUB_STEP_S": "0.05",
        }
        self.log = folder / "head.log"
        command = [
            *RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--dashboard-port={self.dashboard}",
            f"--metrics-export-port={self.metrics}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}",
            f"--temp-dir={self.temp}", "--object-store-memory=100000000", "--include-dashboard=true",
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def job(self, *arguments):
        verb, *rest = arguments
        return [*RAY, "job", verb, "--address", f"http://127.0.0.1:{self.dashboard}", *rest]

    def wait_until_up(self):
        deadline = time.monotonic() + 120
        while True:
            try:
                return self.about("")
            except OSError:  # no answer, or one that it is not ready
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def about(self, submission):
        """What the dashboard says of a job, or of all of them."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.dashboard}/api/jobs/{submission}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def scrape(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return set()
        return {line.split("{")[0] for line in lines if line.startswith("ray_shoal_")}

    def end(self):
        """Everything that was started here, by pid: `ray stop` would end other clusters too."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(5)  # its own way to end takes longer, and is not what is tested
        except subprocess.TimeoutExpired:
            self.process.kill()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if self.temp.encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue
        shutil.rmtree(self.temp, ignore_errors=True)


@pytest.fixture
def head(tmp_path):
    made = Head(tmp_path)
    try:
        made.wait_until_up()
        yield made
    finally:
        made.end()


def test_submit_stop_and_submit_again(head, fields, write_rows, load_job, tmp_path):
    source = write_rows([{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(150)])
    made = fields(source, progress_s=0.5, sampling_params={"max_tokens": 20, "ignore_eos": True})
    work = tmp_path / "work"
    work.mkdir()
    (work / "job.yaml").write_text(yaml.safe_dump(made))
    ran = load_job(made["output"])
    entrypoint = [sys.executable, str(STUB_CLI), "run-batch", "job.yaml"]

    def submit(name):
        log = (tmp_path / f"{name}.log").open("w")
        command = head.job("submit", "--submission-id", name, "--working-dir", str(work), "--", *entrypoint)
        return subprocess.Popen(command, env=head.env, stdout=log, stderr=subprocess.STDOUT)

    def said(name):
        return (tmp_path / f"{name}.log").read_text()

    first = submit("first")
    try:
        ran.process = first
        ran.wait_for(10, timeout=120)
        wanted = {name for metric in METRICS.keys() - AT_NOTHING for name in exported_names(metric)}
        deadline = time.monotonic() + 60
        while missing := wanted - head.scrape():
            assert time.monotonic() < deadline, f"not at the metrics endpoint: {sorted(missing)}"
            assert first.poll() is None, said("first")
            time.sleep(0.3)
        assert " of 150 rows (" in said("first"), "logs do not stream"
        subprocess.run(head.job("stop", "first"), env=head.env, check=True, capture_output=True, timeout=120)
        first.wait(60)
    finally:
        first.kill()
    assert "stopping: rows at work get 44 s to finish" in said("first")
    assert ran.status()["status"] == "cancelled"
    done = len(ran.records("ok"))
    assert 10 <= done < 150
    assert head.about("first")["status"] == "STOPPED"
    second = submit("second")
    try:
        assert second.wait(150) == 0, said("second")
    finally:
        second.kill()
    assert f"going on from an earlier run, which settled {done} rows" in said("second")
    assert "completed: 150 rows answered, 0 errors" in said("second")
    assert [row["id"] for row in ran.rows()] == [f"r{i}" for i in range(150)]
    report = ran.report()
    assert report["rows"]["resumed"] == done
    assert [run["status"] for run in report["runs"]] == ["cancelled", "completed"]
    assert head.about("second")["driver_exit_code"] == 0
