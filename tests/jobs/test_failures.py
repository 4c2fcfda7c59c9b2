"""What dies and what must not: clauses of the reliability contract, at small sizes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from shoal.driver.jobs.outcome import Exit

ROWS = [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(60)]


class Watch(threading.Thread):
    """Reads status.json again and again, as anybody may."""

    def __init__(self, job):
        super().__init__(daemon=True)
        self._job, self._ended, self.seen = job, threading.Event(), []

    def run(self):
        while not self._ended.wait(0.05):
            if (status := self._job.status()) is not None:
                counts = status["request_counts"]
                self.seen.append((status["epoch"], counts["completed"] + counts["failed"]))

    def end(self):
        self._ended.set()
        self.join()
        return self.seen


def ids(rows):
    return [row["id"] for row in rows]


@pytest.mark.contract
def test_rows_that_kill_are_put_aside_and_no_other(run, write_rows):
    """Clause 7. Several rows that kill are in tests/driver/test_suspects.py, and in jobs in the soak's rounds."""
    rows = [dict(row) for row in ROWS]
    rows[17]["sampling_params"] = {"extra_args": {"kill": True}}
    ran = run(write_rows(rows))
    assert ran.code == Exit.COMPLETED
    found = ran.rows()
    assert ids(found) == ids(rows)
    assert [row["id"] for row in found if row["error"]] == ["r17"]
    assert found[17]["error"]["code"] == "engine_killed"
    assert "died 3 times with this row alone in it, and 2 times with others" in found[17]["error"]["message"]
    report = ran.report()
    assert report["rows"]["quarantined"] == 1
    assert report["engines"]["deaths"] <= 5


@pytest.mark.contract
def test_tries_outlive_the_job(run, start, write_rows):
    """Clause 7: The job is killed after two solo deaths of the same row; the next run needs one more, not three."""
    rows = [dict(row) for row in ROWS[:12]]
    rows[5]["sampling_params"] = {"extra_args": {"kill": True}}
    source = write_rows(rows)
    ran = start(source)
    deadline = time.monotonic() + 90
    while sum(meta["alone"] for meta in ran.records("try")) < 2:
        assert time.monotonic() < deadline, ran.log.read_text()
        time.sleep(0.02)
    ran.process.kill()
    ran.process.wait()
    again = run(source)
    assert again.code == Exit.COMPLETED
    assert [row["id"] for row in again.rows() if row["error"]] == ["r5"]
    assert again.report()["engines"]["deaths"] <= 1
    assert [m["id"] for m in again.records("try") if m["alone"]] == ["r5"] * 3


@pytest.mark.contract
@pytest.mark.parametrize("seed", [1])
def test_exactly_once_whatever_dies(start, write_rows, processes, load_job, tmp_path, seed):
    """Clause 1: Job, driver actors and ranks are killed at random; the same command is started again until it
    completes. Clause 20: what the status counts is durable, so that no kill takes any of it back."""
    rng = random.Random(seed)
    print(f"seed {seed}")
    rows = [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(500)]
    rows[123]["sampling_params"] = {"extra_args": {"kill": True}}
    source = write_rows(rows)
    kills, deadline = [], time.monotonic() + 150
    watch = Watch(load_job(tmp_path / "out.jsonl"))
    watch.start()
    while True:
        ran = start(source, env={"SHOAL_STUB_STEP_S": "0.015"})
        while ran.process.poll() is None:
            assert time.monotonic() < deadline, ran.log.read_text()[-3000:]
            time.sleep(rng.uniform(0.05, 0.4))
            before = len(ran.records("ok"))
            if len(kills) < 4 and before > 80 * len(kills) + 20:
                kind = ["ray::StubWorker", "job", "ray::StubDriver"][len(kills) % 3]
                if kind == "job":
                    ran.process.kill()
                    ran.process.wait()
                else:
                    pids = processes.named(kind)
                    if not pids:
                        continue
                    os.kill(rng.choice(pids), signal.SIGKILL)
                kills.append((kind, before))
        print("kills", kills, "code", ran.process.returncode)
        if ran.process.returncode == 0:
            break
        assert ran.process.returncode == -signal.SIGKILL, ran.log.read_text()[-3000:]
    assert len(kills) >= 4
    found = ran.rows()
    assert ids(found) == ids(rows)
    assert [row["id"] for row in found if row["error"]] == ["r123"]
    done = [meta["id"] for meta in ran.records("ok")]
    assert len(done) == len(set(done)) == 499, "no answer was committed twice"
    seen = watch.end()
    counts = [count for _, count in seen]
    assert counts == sorted(counts)
    assert min(count for epoch, count in seen if epoch == 2) >= max(count for epoch, count in seen if epoch == 1) > 0
    assert max(counts) == 500


@pytest.mark.contract
def test_a_killed_job_loses_what_was_in_flight_and_no_more(start, run, write_rows, caplog):
    """Clause 2."""
    rows = [{"id": f"r{i}", "prompt": f"prompt {i}", "note": "x" * 250} for i in range(800)]
    source = write_rows(rows)
    ran = start(source, engine={"max_num_seqs": 32})
    ran.wait_for(400)
    ran.process.kill()
    ran.process.wait()
    done = {meta["id"] for meta in ran.records("ok")}
    caplog.set_level("INFO", "shoal")
    again = run(source, engine={"max_num_seqs": 32})
    assert again.code == Exit.COMPLETED
    assert ids(again.rows()) == ids(rows)
    assert again.report()["rows"]["resumed"] == len(done) >= 400
    assert len(again.records("ok")) == 800, "nothing that was committed was computed again"
    unread = re.search(r"settled (\d+) rows; the first (\d+) are not read again", caplog.text)
    assert 0 < int(unread[2]) <= int(unread[1]) == len(done)
    # A row that changed where nothing shows it, neither size nor the file's ends: all are read again, and it is found.
    rows[410]["note"] = "y" * 250
    changed = run(write_rows(rows), engine={"max_num_seqs": 32})
    assert changed.code == Exit.COMPLETED
    assert changed.rows()[410]["note"] == "y" * 250
    assert changed.report()["rows"]["resumed"] == 799


@pytest.mark.contract
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_running_rows_finish(start, run, write_rows, load_job, tmp_path, monkeypatch, number):
    """Clause 11. The first in a process of its own, for its exit code; the second in this one, which is quicker."""
    rows = [{"id": f"r{i}", "prompt": f"prompt {i}", "sampling_params": {"max_tokens": 40}} for i in range(100)]
    source = write_rows(rows)
    if number == signal.SIGTERM:
        ran = start(source, drain_s=20)
        ran.wait_for(20)
        ran.process.send_signal(number)
        assert ran.end() == 128 + number, ran.log.read_text()
    else:
        ran = load_job(tmp_path / "out.jsonl")
        stopping = threading.Timer(0, lambda: (ran.wait_for(20), os.kill(os.getpid(), number)))
        stopping.start()
        with monkeypatch.context() as patch:
            patch.setenv("SHOAL_STUB_STEP_S", "0.01")
            assert run(source, drain_s=20).code == 128 + number
        stopping.join()
    status = ran.status()
    assert status["status"] == "cancelled"
    assert {"cancelling", "cancelled"} <= status["times"].keys()
    done = len(ran.records("ok"))
    assert 20 < done < 60, "rows at work were finished, no others begun"
    assert not Path(ran.output).exists()
    partial = ran.rows(ran.state / "partial.jsonl")
    assert len(partial) == done
    again = run(source)
    assert again.code == Exit.COMPLETED
    assert again.report()["rows"]["resumed"] == done
    assert ids(again.rows()) == ids(rows)


@pytest.mark.contract
def test_a_second_stop_ends_at_once(start, write_rows):
    """Clause 11."""
    rows = [{"id": f"r{i}", "prompt": "x", "sampling_params": {"max_tokens": 200}} for i in range(30)]
    ran = start(write_rows(rows), drain_s=60, env={"SHOAL_STUB_STEP_S": "0.2"})
    deadline = time.monotonic() + 60
    while not any(
        point["running"] for path in ran.state.glob("samples-*.json") for point in json.loads(path.read_text())
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ran.process.send_signal(signal.SIGTERM)
    time.sleep(4)  # the handler that Ray installs would end the process after 3 s
    assert ran.process.poll() is None
    ran.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert ran.end() == 143, ran.log.read_text()
    assert time.monotonic() - started < 5
    assert ran.status()["status"] == "cancelled"


@pytest.mark.contract
def test_a_job_whose_engines_always_die_fails(run, write_rows, monkeypatch):
    """Clause 8."""
    rows = [{**row, "sampling_params": {"extra_args": {"kill": True}}} for row in ROWS]
    ran = run(write_rows(rows), max_restarts=3)
    assert ran.code == Exit.FAILED
    assert "engines died 4 times with no row answered in between (max_restarts 3)" in ran.status()["message"]
    assert ran.report()["engines"]["deaths"] == 4


@pytest.mark.contract
def test_a_job_whose_engines_never_start_fails(run, write_rows, monkeypatch):
    """Clause 8."""

    def broken(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("shoal.driver.engine.Engine.start", broken)
    monkeypatch.setattr("shoal.driver.replicas.RETRY_S", 0.05)
    ran = run(write_rows(ROWS))
    assert ran.code == Exit.FAILED
    assert ran.status()["message"] == "no engine could be started; the last time: RuntimeError: no such luck"
    assert ran.report()["engines"]["boot_failures"] == 3


@pytest.mark.contract
def test_what_cannot_be_placed_is_refused(run, write_rows, stub_model, tmp_path_factory):
    """Clause 16."""
    wide = shutil.copytree(stub_model, tmp_path_factory.mktemp("wide") / "model")
    config = json.loads((wide / "config.json").read_text())
    heads = {"num_attention_heads": 300, "num_key_value_heads": 300, "hidden_size": 2400, "intermediate_size": 2400}
    (wide / "config.json").write_text(json.dumps(config | heads))
    started = time.monotonic()
    engine = {"model": str(wide), "tensor_parallel_size": 300, "device": "cpu", "placement_timeout_s": 8}
    ran = run(write_rows(ROWS), engine=engine)
    assert ran.code in (Exit.FAILED, Exit.USAGE)
    assert time.monotonic() - started < 30
    message = ran.status()["message"]
    assert "3 for an engine of 300 rank(s); the Ray cluster has 2 in all" in message, message
    gpus = run(write_rows(ROWS), engine={"device": "cuda"}, fresh=True)
    assert gpus.code == Exit.USAGE
    assert "the Ray cluster has 0" in gpus.status()["message"]


@pytest.mark.contract
def test_cpus_that_others_hold_are_waited_for(run, write_rows, held_cpus):
    """Clause 16: not with an engine that has its GPU and gets no row; and the job goes on once they are free."""
    with held_cpus(1.7):
        ran = run(write_rows(ROWS), engine={"placement_timeout_s": 2})
    assert ran.code == Exit.FAILED
    assert "the job needs 0.76 CPUs: 0.25 to read, 0.5 to tokenize, 0.01" in ran.status()["message"]
    assert "the Ray cluster has 2 in all" in ran.status()["message"]
    with held_cpus(1.7, seconds=3):
        ran = run(write_rows(ROWS))
    assert ran.code == Exit.COMPLETED
    assert ids(ran.rows()) == ids(ROWS)


@pytest.mark.contract
def test_tokens_add_up(run, write_rows, monkeypatch, tmp_path):
    """Clause 13: What ranks say they made is what was committed and what was wasted; over a stop and a resumed run."""
    folder = tmp_path / "made"
    folder.mkdir()
    monkeypatch.setenv("SHOAL_STUB_TOKENS", str(folder))
    rows = [{**row, "sampling_params": {"max_tokens": 30, "extra_args": {"length": 3 + i % 20}, "ignore_eos": False}}
            for i, row in enumerate(ROWS)]  # fmt: skip
    ran = run(write_rows(rows))
    assert ran.code == Exit.COMPLETED
    tokens = ran.report()["tokens"]
    in_rows = sum(row["num_generated_tokens"] for row in ran.rows())
    assert tokens["committed"] == in_rows == sum(3 + i % 20 for i in range(60))
    made = sum(int(path.read_text()) for path in folder.iterdir())
    assert tokens["generated"] == tokens["committed"] + tokens["wasted"] == made
    usage = [meta["usage"] for meta in ran.records("ok")]
    assert sum(prompt for prompt, _, _ in usage) == tokens["prompt"] == sum(len(row["prompt"]) for row in rows)


def test_two_engines_share_a_skewed_input(run, write_rows, monkeypatch, tmp_path):
    """All long rows come first and go to one engine, until the other takes what cannot be running there; in the end
    neither stands idle for 5% of the time."""
    folder = tmp_path / "made"
    folder.mkdir()
    monkeypatch.setenv("SHOAL_STUB_TOKENS", str(folder))  # a file a rank, written in every step
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.02")
    rows = [
        {"id": f"r{i}", "prompt": f"prompt {i}", "sampling_params": {"max_tokens": 20 if i < 600 else 2}}
        for i in range(700)
    ]
    ran = run(write_rows(rows), replicas=2)
    assert ran.code == Exit.COMPLETED
    assert ids(ran.rows()) == ids(rows)
    made = list(folder.iterdir())
    assert len(made) == 2
    assert min(int(path.read_text()) for path in made) > 0.4 * 12_200, "both made a good part of the tokens"
    ends = sorted(path.stat().st_mtime for path in made)
    points = json.loads(next(ran.state.glob("samples-*.json")).read_text())
    span = ends[1] - next(point["time"] for point in points if point["running"])
    print(f"tail: one engine idle for {ends[1] - ends[0]:.2f} s of {span:.1f} s")
    assert ends[1] - ends[0] < 0.05 * span


@pytest.mark.contract
def test_one_of_two_engines_dies(run, write_rows, monkeypatch, load_job, tmp_path):
    """Clause 3: the other one works on while the dead one is made anew."""
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.02")
    folder = tmp_path / "made"
    folder.mkdir()
    monkeypatch.setenv("SHOAL_STUB_TOKENS", str(folder))
    rows = [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(600)]
    watched, answers = load_job(tmp_path / "out.jsonl"), []

    def at_work():
        return {int(path.name) for path in folder.iterdir() if int(path.read_text() or 0)}

    def kill_one():
        watched.wait_for(40)
        while len(before := at_work()) < 2:
            assert len(watched.records("ok")) < 300, "only one engine is at work"
            time.sleep(0.02)
        os.kill(min(before), signal.SIGKILL)
        answers.append(len(watched.records("ok")))
        while not at_work() - before and len(watched.records("ok")) < 600:
            time.sleep(0.02)
        answers.append(len(watched.records("ok")))

    thread = threading.Thread(target=kill_one)
    thread.start()
    ran = run(write_rows(rows), replicas=2)
    thread.join()
    assert answers[1] > answers[0] + 8, "nothing was answered while the engine was down"
    assert ran.code == Exit.COMPLETED
    assert ids(ran.rows()) == ids(rows)
    assert all(row["error"] is None for row in ran.rows())
    assert ran.report()["engines"]["deaths"] == 1


@pytest.mark.contract
def test_nothing_is_left_behind(run, write_rows, processes, tmp_path):
    """Clause 15."""
    import ray
    from ray.util import placement_group_table

    def leftovers():
        groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        shared = [name for name in os.listdir("/dev/shm") if not name.startswith("plasma")]
        ranks, drivers = processes.named("ray::StubWorker"), processes.named("ray::StubDriver")
        sockets = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("pymp-")]
        return len(groups), len(ranks), len(drivers), sorted(shared), sockets, ray.available_resources().get("CPU")

    def settled():
        deadline = time.monotonic() + 10
        while leftovers() != before and time.monotonic() < deadline:
            time.sleep(0.1)
        return leftovers()

    before = (0, 0, 0, *leftovers()[3:5], ray.cluster_resources()["CPU"])
    handles = []
    assert settled() == before
    for i in range(3):
        ran = run(write_rows(ROWS), output=str(tmp_path / f"{i}.jsonl"), replicas=2)
        assert ran.code == Exit.COMPLETED
        assert settled() == before
        handles.append(len(os.listdir("/proc/self/fd")))
        files = {f"{j}.jsonl{ending}" for j in range(i + 1) for ending in ("", ".shoal")}
        assert set(os.listdir(tmp_path)) == {"in.jsonl", *files}
    assert handles[2] <= handles[0] + 2, f"open files and sockets after each job: {handles}"
