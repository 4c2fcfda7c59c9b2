"""What only shows with much input or many jobs (clauses 9 and 15), and rows that hang instead of dying (clause 10)."""

from __future__ import annotations

import json
import os
import tempfile
import time

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


def test_input_beyond_memory(start, processes, tmp_path):
    """Clause 9: 2.5 GB of rows through stores of 100 MB and a slow engine; no process grows, nothing is spilled."""
    count, filler = 25_000, "x" * 100_000
    with open(tmp_path / "in.jsonl", "w") as file:
        file.writelines(
            json.dumps({"id": f"r{i}", "prompt": f"prompt {i}", "filler": filler}) + "\n" for i in range(count)
        )
    fields = {"columns": ["id"], "engine": {"max_num_seqs": 64}, "env": {"SHOAL_STUB_STEP_S": "0.02"}}
    ran = start(str(tmp_path / "in.jsonl"), **fields)
    ran.wait_for(count // 10, timeout=300)
    base, most = {}, {}
    while ran.process.poll() is None:
        for pid in [os.getpid(), ran.process.pid, *processes.descendants()]:
            size = private(pid)
            base.setdefault(pid, size)
            most[pid] = max(most.get(pid, 0), size)
        time.sleep(0.25)
    assert ran.process.returncode == 0, ran.log.read_text()[-3000:]
    assert len(ran.rows()) == count
    growth = {processes.title(pid) or pid: (most[pid] - base[pid]) >> 20 for pid in most}
    print(
        f"SOAK 2.5 GB of rows: the most that a process grew after the first tenth: {max(growth.values())} MB",
        flush=True,
    )
    assert max(growth.values()) < 150, growth
    assert not list(spilled()), "Ray wrote objects to the disk"


def private(pid):
    """Bytes of its own, neither files nor shared."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def spilled():
    import ray

    folder = ray._private.worker._global_node.get_session_dir_path()
    for name in os.listdir(folder):
        if name.startswith("ray_spilled_objects"):
            yield from os.listdir(os.path.join(folder, name))


def test_twenty_jobs_leave_nothing(start, processes, write_rows, tmp_path):
    """Clause 15: placement groups, actors, shared memory, sockets and CPUs are after 20 jobs what they were before."""
    import ray
    from ray.util import placement_group_table

    def left():
        groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        actors = [pid for pid in processes.named("ray::") if "Stub" in processes.title(pid)]
        shared = [name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.", "torch_"))]
        sockets = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("pymp-")]
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        return len(groups), len(actors), sorted(shared), sorted(sockets), free

    def settled():
        deadline = time.monotonic() + 20
        while left() != before and time.monotonic() < deadline:
            time.sleep(0.1)
        return left()

    rows = [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(60)]
    source, before = write_rows(rows), left()
    for i in range(20):
        ran = start(source, output=str(tmp_path / f"{i}.jsonl"), replicas=2, env={"SHOAL_STUB_STEP_S": "0.002"})
        assert ran.end(120) == 0, ran.log.read_text()[-3000:]
        assert settled() == before, f"after job {i}"
    print(f"SOAK 20 jobs: before and after {before}", flush=True)


def test_rows_that_hang(start, write_rows):
    """Clause 10: a row in which the rank sleeps for ever is treated as one that kills; the others are answered."""
    rows = [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(200)]
    rows[50]["sampling_params"] = {"extra_args": {"hang": True}}
    engine = {"max_num_seqs": 16, "step_timeout_s": 2}
    ran = start(write_rows(rows), engine=engine, env={"SHOAL_STUB_STEP_S": "0.01"})
    started = time.monotonic()
    assert ran.end(300) == 0, ran.log.read_text()[-3000:]
    found = ran.rows()
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [(row["id"], row["error"]["code"]) for row in found if row["error"]] == [("r50", "engine_killed")]
    wall, deaths = time.monotonic() - started, ran.report()["engines"]["deaths"]
    print(f"SOAK a row that hangs, step deadline 2 s: all rows settled in {wall:.0f} s, {deaths} deaths", flush=True)
