"""A real cluster, `ray start --head` with its job server and a token, and jobs sent to it by `ray job submit`."""

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
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
PORTS += ("ray-client-server-port", "node-manager-port", "object-manager-port", "runtime-env-agent-port")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]


def free_ports(count: int) -> list[int]:
    """Ports that are free now, above those of Ray's workers (10002-19999)."""
    found: list[int] = []
    port = 20000 + os.getpid() % 8000
    while len(found) < count:
        port += 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found


class Head:
    """One `ray start --head`, and what is asked of its job server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['dashboard-port']}"
        token = folder / "ray_token"
        token.write_text(secrets.token_hex(32))
        self.token = token.read_text()
        self.env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_JOB_STOP_WAIT_TIME_S": "30"}
        self.env |= {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0", "RAY_API_SERVER_ADDRESS": self.url}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """`ray start` gives its raylet 30 s and no more, which a busy machine may need: it gets three tries."""
        for _ in range(3):
            if self.begin():
                return
            self.stop()
        raise AssertionError(self.log())

    def begin(self) -> bool:
        """Whether a head came up."""
        command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--num-gpus=0", "--dashboard-host=127.0.0.1"]
        command += [f"--{name}={port}" for name, port in self.ports.items()]
        command += [f"--temp-dir={self.folder}", "--object-store-memory=200000000", "--disable-usage-stats"]
        with (self.folder / "head.log").open("wb") as log:
            self.process = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while self.status_of("/api/version", self.token) != 200 or "Ray runtime started" not in self.log():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def log(self) -> str:
        """What `ray start` has printed."""
        return (self.folder / "head.log").read_text()

    def status_of(self, path: str, token: str | None) -> int:
        """HTTP status of a page; 0 where nothing answers."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def submit(self, name: str, *command: str) -> subprocess.Popen[str]:
        """`ray job submit`, running."""
        line = [RAY, "job", "submit", "--submission-id", name, "--", *command]
        return subprocess.Popen(line, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def pids(self) -> list[int]:
        """Processes of this cluster: their command lines name its folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            if str(self.folder) in line and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        deadline = time.monotonic() + 15
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)  # or the next try joins what is gone


@pytest.fixture(scope="module")
def head():
    folder = Path(tempfile.mkdtemp(prefix="sh-", dir="/tmp"))  # short: sockets lie in it
    made = Head(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def write_rows(path: Path, count: int, name: str) -> list[str]:
    rows = [{"id": f"{name}{i}", "prompt": f"{name} asks number {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["id"] for row in rows]


def command(model: str, source: Path, output: Path, max_tokens: int) -> list[str]:
    sampling = json.dumps({"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0})
    line = [sys.executable, "-m", "shoal", "run-batch", "-i", str(source), "-o", str(output), "--model", model]
    return [*line, "--sampling-params", sampling, "--max-num-seqs", "8", "--dtype", "float32", "--device", "cpu"]


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def state(output: Path, name: str) -> dict:
    return json.loads((Path(f"{output}.shoal") / name).read_text())


def test_no_token_no_answer(head):
    assert head.status_of("/api/jobs/", head.token) == 200
    for token in (None, "0" * 64):
        assert head.status_of("/api/jobs/", token) in (401, 403)
    address = (
        f"127.0.0.1:{head.ports['port']}"  # what the images' HEALTHCHECK runs; in a container Ray finds the address
    )
    for env, works in ((head.env, True), (head.env | {"RAY_AUTH_TOKEN": "0" * 64}, False)):
        asked = subprocess.run([RAY, "health-check", "--address", address], env=env, capture_output=True, timeout=120)
        assert (asked.returncode == 0) == works, asked.stderr


def test_two_jobs_at_once_and_again(head, tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("llama")
    running, expected, outputs, lines = {}, {}, {}, {}
    for name in ("one", "two"):
        source, outputs[name] = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-out.jsonl"
        expected[name] = write_rows(source, 200, name)
        lines[name] = command(model, source, outputs[name], 64)
        running[name] = head.submit(name, *lines[name])
    for name, process in running.items():
        shown, _ = process.communicate(timeout=600)
        assert process.returncode == 0, shown
        assert "completed: 200 rows answered, 0 errors" in shown
        assert ids(outputs[name]) == expected[name]
    times = [state(output, "status.json")["times"] for output in outputs.values()]
    assert max(t["in_progress"] for t in times) < min(t["completed"] for t in times), "they did not run at once"

    before = outputs["one"].read_bytes()
    again = head.submit("one-again", *lines["one"])
    shown, _ = again.communicate(timeout=300)
    assert again.returncode == 0, shown
    assert "going on from an earlier run, which settled 200 rows" in shown
    assert outputs["one"].read_bytes() == before


def test_a_head_that_goes_lets_jobs_finish_what_they_began(head, tiny_checkpoint, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    expected = write_rows(source, 600, "row")
    line = command(tiny_checkpoint("llama"), source, output, 80)
    process = head.submit("stopped", *line)
    folder, deadline = Path(f"{output}.shoal"), time.monotonic() + 300
    while not any(b'"t":"ok"' in path.read_bytes() for path in folder.glob("ledger-*.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    stopping = subprocess.run(
        [sys.executable, str(ROOT / "docker/stop_jobs.py")], env=head.env, capture_output=True, text=True, timeout=120
    )
    assert stopping.returncode == 0, stopping.stderr
    shown, _ = process.communicate(timeout=60)
    assert "the same command resumes" in shown
    assert state(output, "status.json")["status"] == "cancelled"
    assert not output.exists()

    resumed = head.submit("resumed", *line)
    shown, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, shown
    assert "going on from an earlier run, which settled" in shown
    assert ids(output) == expected
