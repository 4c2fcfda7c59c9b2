"""A batch job of a million rows through an engine that costs nothing: what the job itself takes, in time and memory.

    python benchmarks/jobs_scale.py                   # rows/s, growth of each process's private memory, bytes spilled
    python benchmarks/jobs_scale.py --resume          # kills the job at half of its rows: how soon the next one works
    python benchmarks/jobs_scale.py --resume --cluster    # the same on a Ray that runs already
    python benchmarks/jobs_scale.py --rows 100000 --profile scale.svg    # with py-spy

The job is `shoal run-batch` as it is, on a local Ray of its own. Its engine is a Ray actor that answers each request
at once with the same tokens. Private memory is RssAnon: neither files nor Ray's shared store are in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

PROMPT = "Say in one sentence what happened to traveller number {i} between the mountains and the sea."
ANSWER = list(range(10, 26))
SLOTS = 1024
BYTES_A_ROW, BYTES_MORE = 24, 64 << 20


class StubEngine:
    """The actor: what the driver actor is to its client, without scheduler and ranks."""

    def __init__(self) -> None:
        self._finished: deque = deque()
        self._taken = 0
        self._news = threading.Condition()

    def submit(self, requests) -> None:
        with self._news:
            self._finished += [request.number for request in requests]
            self._news.notify()

    def collect(self, mark, timeout):
        from shoal.driver.actor import Collected
        from shoal.driver.request import FinishedRequest

        with self._news:
            for _ in range(mark - self._taken):
                self._finished.popleft()
            self._taken = mark
            self._news.wait_for(lambda: self._finished, timeout)
            done = [FinishedRequest(number, ANSWER, "length") for number in self._finished]
        mark = self._taken + len(done)
        return Collected(done, mark, len(done), 0, 0.5, mark * len(ANSWER))

    def abort(self, numbers) -> None:
        pass

    def num_made_tokens(self) -> int:
        return self._taken * len(ANSWER)

    def shutdown(self) -> None:
        pass


def run_the_job(folder: Path) -> int:
    """In a process of its own."""
    import ray

    from shoal.driver.engine import Engine
    from shoal.driver.jobs.config import make_job
    from shoal.driver.jobs.job import run_job
    from shoal.driver.jobs.model import RowModel
    from shoal.driver.resolve import ResolvedConfig
    from shoal.driver.torch_free import keep_torch_out

    actor = ray.remote(num_cpus=0, max_concurrency=4)(StubEngine)

    class StubClient(Engine):
        def _create(self):
            self._driver, self._mark = actor.remote(), 0
            self.resolved = ResolvedConfig(
                "stub", "LlamaForCausalLM", "cpu", "float32", 1, 512, SLOTS, 8192, 16, 1024, 0, 0, 0.0, 4, 2
            )

    class StubModel(RowModel):
        @classmethod
        def find(cls, config):
            keep_torch_out()  # as the command does
            return super().find(config)

        def portable(self):
            return RowModel(self.config, self.resolved, self.tokenizer, self.tokenizer_json).portable()

        def starter(self, solo_deaths, silence_s=None):
            return lambda place=None: StubClient.start(self.config, lambda: None, False, place)

    config = make_job(
        {
            "input": str(folder / "in.jsonl"), "output": str(folder / "out.jsonl"), "progress_s": 5,
            "engine": {"model": str(folder / "model")}, "sampling_params": {"max_tokens": len(ANSWER)},
        }
    )  # fmt: skip
    return run_job(config, StubModel.find)


def make_files(folder: Path, rows: int) -> None:
    import importlib.util

    stub = Path(__file__).resolve().parents[1] / "tests/stub/stub_ranks.py"
    spec = importlib.util.spec_from_file_location("stub_ranks", stub)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (folder / "model").mkdir()
    module.make_model(folder / "model")
    with open(folder / "in.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": f"row-{i}", "prompt": PROMPT.format(i=i)}) + "\n" for i in range(rows))


def descendants(of: set[int]) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = path.read_text().split(" (", 1)
            parents[int(pid)] = int(rest.rsplit(")", 1)[1].split()[1])
    found, more = set(), set(of)
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found |= more
    return found


class Watch:
    """The processes of a running job: what they hold of memory, and how far the job is."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.state = folder / "out.jsonl.shoal"
        self.started = time.monotonic()
        self.process = subprocess.Popen(command)
        self.settled = 0
        self.samples: list[tuple[float, int, dict[int, int]]] = []
        self.names: dict[int, str] = {}
        self.cpu_s: dict[int, float] = {}
        self.known = {self.process.pid}

    def poll(self) -> bool:
        """A sample; False once the job has ended."""
        if self.process.poll() is not None:
            return False
        with contextlib.suppress(FileNotFoundError):
            self.settled = self._settled()
        self.known |= descendants(self.known)
        private = {pid: size for pid in self.known if (size := self._private(pid)) is not None}
        self.samples.append((time.monotonic() - self.started, self.settled, private))
        return True

    def _settled(self) -> int:
        counts = json.loads((self.state / "status.json").read_text())["request_counts"]
        return counts["completed"] + counts["failed"]

    def _private(self, pid: int) -> int | None:
        try:
            with open(f"/proc/{pid}/status") as file:
                fields = dict(line.split(":", 1) for line in file)
            with open(f"/proc/{pid}/cmdline") as file:
                words = file.read().replace("\0", " ").split()
            if words and not (words[0] == "ray::IDLE" and pid in self.names):  # an idle worker keeps its last name
                self.names[pid] = " ".join(word.rsplit("/", 1)[-1] for word in words)[:60]
            with open(f"/proc/{pid}/stat") as file:
                times = file.read().rsplit(")", 1)[1].split()[11:13]
            self.cpu_s[pid] = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        except (FileNotFoundError, ProcessLookupError):
            return None
        return int(fields["RssAnon"].split()[0]) << 10 if "RssAnon" in fields else None

    def end(self) -> None:
        """Nothing of it stays behind, also when it was killed."""
        for pid in self.known | descendants(self.known):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def measure(folder: Path, command: list[str], rows: int) -> None:
    watch = Watch(folder, command)
    try:
        while watch.poll():
            with contextlib.suppress(subprocess.TimeoutExpired):
                watch.process.wait(1.0)  # a look takes milliseconds of the cores that the job is to have
    except SystemExit:
        wall = time.monotonic() - watch.started
        print(f"ended from outside after {wall:.0f} s, with {watch.settled} of {rows} rows settled")
        print_growth(watch, rows)
        raise
    finally:
        watch.end()
    assert watch.process.returncode == 0, f"the job ended with {watch.process.returncode}"
    wall = time.monotonic() - watch.started
    times = json.loads((watch.state / "report.json").read_text())["times"]
    states = [f"{name} {time_ - times['validating']:.1f} s" for name, time_ in times.items()]
    print(
        f"{rows} rows in {wall:.1f} s from start to exit: {rows / wall:.0f} rows/s; states began at {', '.join(states)}"
    )
    work = times["finalizing"] - times["in_progress"]
    print(f"  while in_progress: {rows / work:.0f} rows/s")
    print(f"  CPU time of all processes: {sum(watch.cpu_s.values()) / rows * 1e6:.0f} us a row")
    print_growth(watch, rows)
    print(f"  spilled: {spilled()} bytes")


def print_growth(watch: Watch, rows: int) -> None:
    """How far each process got above what it held when a tenth of the rows was settled; one that Ray had just started
    or started later, above what those of its name held then."""
    start = next(i for i, (_, settled, _) in enumerate(watch.samples) if settled >= rows / 10)
    base, later = watch.samples[start][2], watch.samples[start:]
    kinds: dict[str, int] = {}
    for pid, size in base.items():
        kinds[watch.names[pid]] = max(kinds.get(watch.names[pid], 0), size)
    base = {pid: max(base.get(pid, 0), kinds.get(name, 0)) for pid, name in watch.names.items()}
    allowed = BYTES_A_ROW * rows * 0.9 + BYTES_MORE
    grown = {pid: max(s[2].get(pid, 0) for s in later) - base.get(pid, 0) for s in later for pid in s[2]}
    print(f"  private memory after the first tenth (allowed: {allowed / 1e6:.0f} MB):")
    busiest = sorted(watch.cpu_s, key=lambda pid: -watch.cpu_s[pid])[:8]
    most = sorted(grown, key=lambda pid: -grown[pid])[:4]
    for pid in dict.fromkeys([*most, *busiest]):
        growth = grown.get(pid, 0)
        verdict = "ok" if growth <= allowed else "TOO MUCH"
        from_, cpu = f"from {base.get(pid, 0) / 1e6:6.1f}", f"CPU {watch.cpu_s[pid]:6.1f} s"
        print(f"    {growth / 1e6:+8.1f} MB {from_}  {verdict}  {cpu}  {watch.names[pid]}")


def spilled() -> int:
    """Bytes that Ray wrote to disk for want of room in its store."""
    sessions = list((Path(os.environ["RAY_TMPDIR"]) / "ray").glob("session_2*"))
    assert sessions, "there was no Ray"
    return sum(file.stat().st_size for one in sessions for file in one.glob("ray_spilled_objects*/*"))


def resume(folder: Path, command: list[str], rows: int) -> None:
    watch = Watch(folder, command)
    try:
        while watch.poll() and watch.settled < rows // 2:
            time.sleep(0.1)
        at = watch.settled
    finally:
        watch.end()
    second = Watch(folder, command)
    ledger = watch.state / "ledger-000002.jsonl"
    try:
        while second.poll():
            if ledger.exists() and b' {"t":"ok"' in ledger.read_bytes()[:4096]:
                print(f"killed at {at} of {rows} rows; the first new answer {time.monotonic() - second.started:.1f} s "
                      "after the command was started again")  # fmt: skip
                break
            time.sleep(0.05)
        else:
            raise SystemExit("the job ended before it did new work")
        while second.poll():
            time.sleep(0.5)
    finally:
        second.end()
    report = json.loads((second.state / "report.json").read_text())
    with open(folder / "out.jsonl", encoding="utf-8") as file:
        found = [json.loads(line)["id"] for line in file]
    assert found == [f"row-{i}" for i in range(rows)], "rows are missing, or there twice"
    print(f"  it ended with all {rows} rows once, {report['rows']['resumed']} of them from the first run")


@contextlib.contextmanager
def running_ray():
    """A Ray with two CPUs, which the job joins by RAY_ADDRESS."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    time.sleep(10)  # its own start is over
    try:
        yield
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--resume", action="store_true", help="kill at half, and time the next run's start")
    parser.add_argument("--cluster", action="store_true", help="join a Ray that runs, and start none of its own")
    parser.add_argument("--profile", metavar="FILE", help="py-spy's record of the job's process")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing of it stays behind
    if args.child:
        sys.exit(run_the_job(Path(args.child)))
    with tempfile.TemporaryDirectory(prefix="shoal-scale-") as name:
        folder = Path(name)
        os.environ |= {"RAY_TMPDIR": name, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{name}/token"}
        (folder / "token").write_text(os.urandom(32).hex())
        make_files(folder, args.rows)
        command = [sys.executable, os.path.abspath(__file__), "--child", name]
        if args.profile:
            command = [
                "py-spy",
                "record",
                "-o",
                args.profile,
                "--rate",
                "50",
                "--format",
                "raw",
                "--threads",
                "--",
                *command,
            ]
        with running_ray() if args.cluster else contextlib.nullcontext():
            (resume if args.resume else measure)(folder, command, args.rows)


if __name__ == "__main__":
    main()
