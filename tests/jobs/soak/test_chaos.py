"""Everything dies at random moments, for a long time: no row is lost, none is there twice, no innocent is put aside.

`make soak` prints what it did; SHOAL_SOAK_ROUNDS and SHOAL_SOAK_SEED change how many rounds there are, and which.
"""

from __future__ import annotations

import collections
import os
import random
import threading
import time

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

ROUNDS = int(os.environ.get("SHOAL_SOAK_ROUNDS", 20))
FIRST_SEED = int(os.environ.get("SHOAL_SOAK_SEED", 1))
SMALL = {"max_restarts": 40, "engine": {"max_num_seqs": 16}}


def make_rows(count, killers):
    rows = [{"id": f"r{i}", "prompt": f"prompt {i}", "sampling_params": {"temperature": 1.0}} for i in range(count)]
    for i in killers:
        rows[i]["sampling_params"] = {"extra_args": {"kill": True}}
    return rows


class Counts(threading.Thread):
    """Reads the status all the time."""

    def __init__(self, job):
        super().__init__(daemon=True)
        self._job, self._ended, self.seen = job, threading.Event(), []

    def run(self):
        while not self._ended.wait(0.05):
            if (status := self._job.status()) is not None:
                self.seen.append(sum(status["request_counts"][name] for name in ("completed", "failed")))

    def end(self):
        self._ended.set()
        self.join()
        return self.seen


def check(ran, rows, killers):
    """Every row once in the output, every answer once in the ledger, and errors only where a row kills."""
    found = ran.rows()
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    bad = [row["id"] for row in found if row["error"]]
    assert bad == [rows[i]["id"] for i in killers], f"put aside: {bad}"
    done = [meta["id"] for meta in ran.records("ok")]
    assert len(done) == len(set(done)) == len(rows) - len(killers), "an answer was committed twice, or never"
    tokens = ran.report()["tokens"]
    assert tokens["generated"] == tokens["committed"] + tokens["wasted"]
    return tokens


def story(seed, chaos, ran, wall, rows, made=None):
    """`made`: where ranks leave what they made; else only what engines told of is known."""
    kinds = collections.Counter(kind for kind, _ in chaos.kills)
    tokens, report = ran.report()["tokens"], ran.report()
    generated = tokens["generated"] if made is None else sum(int(path.read_text() or 0) for path in made.iterdir())
    extra = generated / tokens["committed"] - 1
    print(
        f"SOAK seed {seed}: {len(rows)} rows in {wall:.1f} s, {chaos.runs} runs; killed {dict(sorted(kinds.items()))}; "
        f"lost 0, twice 0; put aside {report['request_counts']['failed']}; extra work {extra:.1%}",
        flush=True,
    )


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + ROUNDS))
def test_rounds(chaos, write_rows, load_job, tmp_path, seed):
    """Clauses 1, 2, 7 and 20, over and over."""
    rng = random.Random(seed)
    killers = sorted(rng.sample(range(600), rng.choice([0, 1, 1, 2])))
    rows = make_rows(600, killers)
    made = tmp_path / "made"
    made.mkdir()
    chaos, counts = chaos(rng), Counts(load_job(tmp_path / "out.jsonl"))
    counts.start()
    started = time.monotonic()
    env = {"SHOAL_STUB_STEP_S": "0.03", "SHOAL_STUB_TOKENS": str(made)}
    ran = chaos.run(write_rows(rows), rng.randint(3, 5), 600, replicas=2, env=env, **SMALL)
    wall = time.monotonic() - started
    check(ran, rows, killers)
    seen = counts.end()
    assert seen == sorted(seen), "a count of the status fell"
    story(seed, chaos, ran, wall, rows, made)


@pytest.mark.parametrize("seed", [301, 302])
def test_stages(chaos, write_rows, seed):
    """Tasks of Ray Data die while they read rows and make them ready: the input is too large to be read ahead."""
    rows = [row | {"note": "x" * 6000} for row in make_rows(16_000, [])]
    chaos = chaos(random.Random(seed))
    started = time.monotonic()
    fields = {"max_restarts": 40, "engine": {"max_num_seqs": 256}, "env": {"SHOAL_STUB_STEP_S": "0.02"}}
    ran = chaos.run(write_rows(rows), 12, len(rows), kinds=("stage",), **fields)
    wall = time.monotonic() - started
    check(ran, rows, [])
    assert len(chaos.kills) >= 6, "tasks had ended before"
    assert chaos.runs == 1
    story(seed, chaos, ran, wall, rows)


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_full_size(chaos, write_rows, tmp_path, seed):
    """Clause 1 at its full size: 10,000 rows, a dozen kills, four rows that kill."""
    rng = random.Random(seed)
    killers = sorted(rng.sample(range(10_000), 4))
    rows = make_rows(10_000, killers)
    chaos = chaos(rng)
    started = time.monotonic()
    made = tmp_path / "made"
    made.mkdir()
    env = {"SHOAL_STUB_STEP_S": "0.03", "SHOAL_STUB_TOKENS": str(made)}
    fields = {"replicas": 2, "max_restarts": 40, "engine": {"max_num_seqs": 64}, "env": env}
    ran = chaos.run(write_rows(rows), 12, 10_000, timeout_s=1100, **fields)
    wall = time.monotonic() - started
    check(ran, rows, killers)
    story(seed, chaos, ran, wall, rows, made)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_killed_jobs_resume(start, write_rows, tmp_path, share):
    """Clause 2 at its three points: what a kill costs is what was in flight, not what was done."""
    rows = make_rows(2000, [])
    source = write_rows(rows)
    made = tmp_path / "made"
    made.mkdir()
    env = {"SHOAL_STUB_STEP_S": "0.02", "SHOAL_STUB_TOKENS": str(made)}
    ran = start(source, env=env, **SMALL)
    ran.wait_for(int(share * 2000), timeout=200)
    ran.process.kill()
    ran.process.wait()
    before = {meta["id"] for meta in ran.records("ok")}
    started = time.monotonic()
    again = start(source, env=env, **SMALL)
    again.wait_for(len(before) + 1, timeout=200)
    soon = time.monotonic() - started
    assert again.end(300) == 0, again.log.read_text()
    check(again, rows, [])
    lost = sum(int(path.read_text() or 0) for path in made.iterdir()) / 8 - 2000
    assert lost <= 2 * 16 + 64, "more than the window of the engine and one commit"
    print(
        f"SOAK killed at {share:.0%}: first new answer after {soon:.1f} s, {lost:.0f} rows computed again", flush=True
    )


@pytest.mark.parametrize("seed", [201, 202, 203])
def test_float32_rows_are_those_of_a_quiet_run(chaos, start, write_rows, tiny_checkpoint, tmp_path, seed):
    """Clause 17 with a model that computes: greedy and seeded rows, 1 and 4 replicas, with and without kills."""
    rng = random.Random(seed)
    rows = [
        {"id": f"r{i}", "prompt": f"prompt {i}, and some words",
         "sampling_params": {"temperature": 0.9, "seed": i} if i % 2 else {"temperature": 0.0}} for i in range(240)
    ]  # fmt: skip
    fields = {
        "stub": False, "sampling_params": {"max_tokens": 24, "ignore_eos": True}, "max_restarts": 40,
        "engine": {"model": tiny_checkpoint("llama"), "dtype": "float32", "max_num_seqs": 8, "max_model_len": 128,
                   "device": "cpu"},
    }  # fmt: skip
    source = write_rows(rows)
    texts = {}
    for name, replicas, kills in (("quiet", 1, 0), ("killed", 2, 4), ("four", 4, 0)):
        one = chaos(rng)
        place = {"output": str(tmp_path / f"{name}.jsonl")}
        started = time.monotonic()
        ran = one.run(source, kills, len(rows), replicas=replicas, **place, **fields)
        texts[name] = [(row["id"], row["generated_text"]) for row in ran.rows()]
        assert [row_id for row_id, _ in texts[name]] == [row["id"] for row in rows]
        story(f"{seed} ({name})", one, ran, time.monotonic() - started, rows)
    assert texts["killed"] == texts["quiet"]
    assert texts["four"] == texts["quiet"]
