"""What comes out of a job for what goes in: clause 6 of the reliability contract (bad rows), formats, resuming."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.driver.jobs.outcome import Exit

ROWS = [{"id": f"r{i}", "prompt": f"prompt {i}", "label": i} for i in range(40)]


def test_every_row_is_answered_once(run, write_rows):
    ran = run(write_rows(ROWS))
    assert ran.code == Exit.COMPLETED
    rows = ran.rows()
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    assert all(row["num_generated_tokens"] == 8 and row["error"] is None and row["label"] == i
               for i, row in enumerate(rows))  # fmt: skip
    assert len({row["generated_text"] for row in rows}) > 30, "unseeded rows draw from streams of their own"
    report = ran.report()
    assert report["status"] == "completed"
    assert list(report["times"]) == ["validating", "in_progress", "finalizing", "completed"]
    assert report["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    tokens = report["tokens"]
    assert tokens["generated"] == tokens["committed"] + tokens["wasted"]
    assert tokens["committed"] == 320


@pytest.mark.contract
def test_bad_rows_harm_no_other(run, write_rows):
    """Clause 6."""
    bad = [
        ({"id": "long", "prompt": "x" * 400}, "invalid_prompt", "tokenize"),
        ({"id": "role", "messages": [{"content": "no role"}]}, "invalid_messages", "template"),
        ({"id": "schema", "messages": 7}, "invalid_messages", "template"),
        ('{"id": "nan", "prompt": "x", "sampling_params": {"temperature": NaN}}', "invalid_parameter", "parameters"),
        ('{"id": "surrogate", "prompt": "a\\ud800b"}', "invalid_prompt", "tokenize"),
        ({"id": "unknown", "prompt": "x", "sampling_params": {"temprature": 1}}, "invalid_parameter", "parameters"),
        ({"id": "empty", "prompt": ""}, "invalid_prompt", "tokenize"),
        ({"id": "vocabulary", "prompt": [5, 100000]}, "invalid_prompt", "tokenize"),
        ({"id": "n", "prompt": "x", "sampling_params": {"n": 0}}, "invalid_parameter", "parameters"),
    ]  # fmt: skip
    mixed = [line for pair in zip(ROWS, bad, strict=False) for line in (pair[0], pair[1][0])]
    ran = run(write_rows(mixed))
    assert ran.code == Exit.COMPLETED
    rows = ran.rows()
    assert len(rows) == len(mixed)
    for row, (_, code, stage) in zip(rows[1::2], bad, strict=True):
        assert (row["error"]["code"], row["error"]["stage"]) == (code, stage), row
        assert row["error"]["message"]
    alone = run(write_rows([pair[0] for pair in zip(ROWS, bad, strict=False)], "alone.jsonl"), fresh=True)
    assert [row["generated_text"] for row in rows[::2]] == [row["generated_text"] for row in alone.rows()]


def test_openai_lines(run, write_rows, tmp_path):
    def line(i, url="/v1/chat/completions", **body):
        return {"custom_id": f"c{i}", "method": "POST", "url": url, "body": {"model": "any", **body}}

    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    lines = [
        line(0, **chat, n=2),
        line(1, "/v1/completions", prompt="hi"),
        line(2, **chat, temperature=9),
        line(3, **chat),
        line(4, **chat, stream=True),
    ]
    ran = run(write_rows(lines), sampling_params={"ignore_eos": True})
    assert ran.code == Exit.COMPLETED
    good, bad = ran.rows(), ran.rows(tmp_path / "out.errors.jsonl")
    assert [row["custom_id"] for row in good] == ["c0", "c1", "c3"]
    bodies = [row["response"]["body"] for row in good]
    assert [len(body["choices"]) for body in bodies] == [2, 1, 1]
    assert [body["usage"]["completion_tokens"] for body in bodies] == [6, 16, 3]
    assert bodies[0]["object"] == "chat.completion"
    assert bodies[0]["model"] == "any"
    assert [(row["custom_id"], row["response"]["status_code"]) for row in bad] == [("c2", 400), ("c4", 400)]
    strict = run(write_rows(lines), sampling_params={"ignore_eos": True}, strict_model=True, fresh=True)
    assert {row["error"]["code"] for row in strict.rows(tmp_path / "out.errors.jsonl")} == {
        "model_mismatch", "unsupported_parameter",
    }  # fmt: skip


def test_tables(run, tmp_path):
    table = pa.Table.from_pylist([{"id": i, "messages": [{"role": "user", "content": f"m{i}"}]} for i in range(20)])
    pq.write_table(table.append_column("blob", [[b"\xff"] * 20]), tmp_path / "in.parquet")
    ran = run(
        str(tmp_path / "in.parquet"), output=str(tmp_path / "out.parquet"), columns=["messages"], token_ids=True
    )  # fmt: skip
    found = pq.read_table(ran.output).to_pylist()
    assert [row["id"] for row in found] == list(range(20))
    assert all(len(row["generated_tokens"]) == 8 for row in found)
    assert found[3]["messages"] == [{"role": "user", "content": "m3"}]
    with open(tmp_path / "in.csv", "w", newline="") as file:
        csv.writer(file).writerows([["name", "city"], ["Ann", "Rome"], ["Bob", "Oslo, NO"]])
    ran = run(
        str(tmp_path / "in.csv"), output=str(tmp_path / "csv.jsonl"), columns=["name"],
        prompt_template="{{ name }} lives in {{ city }}.",
    )  # fmt: skip
    assert [(row["id"], row["name"], row["num_input_tokens"]) for row in ran.rows()] == [
        ("in.csv:2", "Ann", 18), ("in.csv:3", "Bob", 22),
    ]  # fmt: skip
    assert "city" not in ran.rows()[0]


def test_parts_and_completion_order(run, write_rows, tmp_path):
    rows = [{**row, "sampling_params": {"max_tokens": 1 + 20 * (i % 5 == 0)}} for i, row in enumerate(ROWS)]
    rows[7] = {"id": "bad", "prompt": ""}
    ran = run(write_rows(rows), output=f"{tmp_path}/parts/", rows_per_part=15, order="completion")
    names = ["part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl"]
    assert sorted(os.listdir(tmp_path / "parts")) == ["_shoal", *names]
    found = [[row["id"] for row in ran.rows(tmp_path / "parts" / name)] for name in names]
    assert [sorted(part) for part in found] == [sorted(r["id"] for r in rows[i : i + 15]) for i in (0, 15, 30)]
    assert found[0][0] != "r0", "row 0 is one of the slowest"
    before = [os.stat(tmp_path / "parts" / name).st_mtime_ns for name in names]
    assert run(write_rows(rows), output=ran.output, rows_per_part=15, order="completion").code == Exit.COMPLETED
    assert [os.stat(tmp_path / "parts" / name).st_mtime_ns for name in names] == before
    shorter = run(write_rows(rows[:10]), output=ran.output, rows_per_part=15, accept_changes=True)
    assert shorter.code == Exit.COMPLETED
    assert sorted(os.listdir(tmp_path / "parts")) == ["_shoal", "part-00000.jsonl"]


def test_an_object_store(run, write_rows, monkeypatch):
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.02")  # answers come a few at a time
    ran = run(write_rows(ROWS), output="memory://jobs/a.jsonl", object_rows=7)
    assert ran.code == Exit.COMPLETED
    files = fsspec.filesystem("memory")
    rows = [json.loads(line) for line in files.cat_file("/jobs/a.jsonl").splitlines()]
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    assert len(files.glob("/jobs/a.jsonl.shoal/ledger-000001-*.jsonl")) >= 3
    again = run(write_rows(ROWS), output="memory://jobs/a.jsonl", object_rows=7)
    assert again.code == Exit.COMPLETED
    assert not files.glob("/jobs/a.jsonl.shoal/ledger-000002-*.jsonl"), "nothing was computed again"


def test_a_long_input_is_looked_through_once(run, write_rows, monkeypatch):
    """More rows than are validated ahead: how many there are is then not known before they are read."""
    first = run(write_rows(ROWS), validate_rows=10)
    assert first.code == Exit.COMPLETED
    monkeypatch.setattr("shoal.driver.jobs.job.validate", lambda *_: pytest.fail("looked through again"))
    again = run(write_rows(ROWS), validate_rows=10)
    assert again.code == Exit.COMPLETED
    assert again.rows() == first.rows()
    assert again.report()["rows"]["resumed"] == 40


@pytest.mark.contract
def test_a_folder_is_cut_anew(run, write_rows, tmp_path):
    """Clause 1: every row once, also where the same output is asked for in other parts."""
    for size, count in ((10, 4), (25, 2), (7, 6)):
        ran = run(write_rows(ROWS), output=f"{tmp_path}/parts/", rows_per_part=size)
        assert ran.code == Exit.COMPLETED
        parts = sorted((tmp_path / "parts").glob("part-*"))
        assert len(parts) == count
        assert [row["id"] for part in parts for row in ran.rows(part)] == [row["id"] for row in ROWS]
    assert ran.report()["rows"]["resumed"] == 40


def test_a_finished_job_starts_no_engine(run, write_rows, monkeypatch):
    first = run(write_rows(ROWS))
    expected = first.rows()
    os.unlink(first.output)

    def refuse(*_):
        raise AssertionError("an engine was started")

    with monkeypatch.context() as patch:
        patch.setattr("shoal.driver.engine.Engine.start", refuse)
        again = run(write_rows(ROWS))
    assert again.code == Exit.COMPLETED
    assert again.rows() == expected
    assert again.report()["rows"]["resumed"] == 40


def test_changes_are_noticed(run, write_rows, caplog):
    source = write_rows(ROWS)
    expected = run(source).rows()
    changed = run(source, sampling_params={"max_tokens": 9, "ignore_eos": True})
    assert changed.code == Exit.CHANGED
    rows = [*ROWS[:5], {**ROWS[5], "prompt": "another"}, {"id": "new", "prompt": "in between"}, *ROWS[6:]]
    refused = run(write_rows(rows))
    assert refused.code == Exit.CHANGED
    assert refused.rows() == expected
    err = caplog.text
    assert "sampling_params was" in err
    assert "input file in.jsonl changed" in err
    accepted = run(write_rows(rows), accept_changes=True)
    assert accepted.code == Exit.COMPLETED
    assert [row["id"] for row in accepted.rows()] == [row["id"] for row in rows]
    assert [row["index"] for row in accepted.records("ok")][40:] == [5, 6], "only these two were computed again"
    assert accepted.rows()[7:] == expected[6:]
    broken = run(write_rows([*rows, "no json"], "broken.jsonl"), fresh=True)
    assert broken.code == Exit.INVALID_INPUT
    assert len(broken.records("ok")) == 42, "a fresh start that cannot be one costs nothing"
    fresh = run(source, sampling_params={"max_tokens": 9, "ignore_eos": True}, fresh=True)
    assert fresh.code == Exit.COMPLETED
    assert {row["num_generated_tokens"] for row in fresh.rows()} == {9}


@pytest.mark.contract
def test_validation_comes_before_engines(run, write_rows, monkeypatch, caplog):
    """Clause 14."""
    lines = [*ROWS[:3], "no json", ROWS[0], *ROWS[3:]]
    with monkeypatch.context() as patch:
        patch.setattr("shoal.driver.engine.Engine.start", lambda *_: pytest.fail("an engine was started"))
        ran = run(write_rows(lines))
    assert ran.code == Exit.INVALID_INPUT
    err = caplog.text
    assert "in.jsonl:4: the line is not JSON" in err
    assert "in.jsonl:5: the id 'r0' was there before" in err
    assert ran.status()["status"] == "failed"
    assert not Path(ran.output).exists()
    ran = run(write_rows(lines), on_invalid="continue")
    assert ran.code == Exit.COMPLETED
    assert [row["error"]["code"] for row in ran.rows() if row["error"]] == ["invalid_json", "duplicate_id"]
    assert len(ran.rows()) == 42


@pytest.mark.parametrize(("short_s", "begins"), [(3600.0, False), (-1.0, True)])
def test_ray_begins_beside_a_long_validation_only(run, write_rows, monkeypatch, short_s, begins):
    """One that is short may be all that the job does; a long one and Ray's start go by together."""
    begun = []
    monkeypatch.setattr("shoal.driver.jobs.held_ray.HeldRay.begin", lambda held: begun.append(held))
    monkeypatch.setattr("shoal.driver.jobs.job._SHORT_S", short_s)
    assert run(write_rows([*ROWS[:3], "no json"])).code == Exit.INVALID_INPUT
    assert bool(begun) == begins


def test_validation_streams_beyond_its_limit(run, write_rows):
    ran = run(write_rows([*ROWS, "no json"]), validate_rows=20)
    assert ran.code == Exit.COMPLETED
    assert [row["error"]["code"] for row in ran.rows() if row["error"]] == ["invalid_json"]


def test_too_many_errors_end_a_job(run, write_rows):
    rows = [{**row, "prompt": ""} if i % 4 == 0 else row for i, row in enumerate(ROWS)]
    ran = run(write_rows(rows), max_errors=5)
    assert ran.code == Exit.FAILED
    assert "more than max_errors=5" in ran.status()["message"]
    assert ran.status()["request_counts"]["failed"] > 5
    assert run(write_rows(rows), max_errors="25%").code == Exit.COMPLETED


def test_errors_can_be_tried_again(run, write_rows, monkeypatch):
    source = write_rows([*ROWS[:5], {"id": "bad", "prompt": ""}])
    assert run(source).code == Exit.COMPLETED
    again = run(source, retry_errors=True)
    assert again.code == Exit.COMPLETED
    assert len(again.records("err")) == 2
    assert len(again.records("ok")) == 5
    assert [row["id"] for row in again.rows()] == ["r0", "r1", "r2", "r3", "r4", "bad"]


@pytest.mark.contract
def test_a_full_disk_pauses_a_job(run, write_rows, monkeypatch):
    """Clause 12: Writes fail for a while in the middle of a job; it waits, and then ends as if nothing had been."""
    import errno

    real, began = os.write, []

    def write(handle, data):
        if len(data) > 200 and bytes(data[8:16]) == b' {"t":"o':
            began.append(time.monotonic())
            if len(began) > 1 and began[-1] - began[1] < 1.5:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    ran = run(write_rows(ROWS), commit_rows=4)
    assert ran.code == Exit.COMPLETED
    assert began[-1] - began[1] >= 1.5
    assert [row["id"] for row in ran.rows()] == [row["id"] for row in ROWS]


def test_progress_and_samples(run, write_rows, caplog, monkeypatch):
    caplog.set_level("INFO", "shoal")
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.2")  # a sample is taken once a second
    ran = run(write_rows(ROWS), progress_s=0.3)
    err = caplog.text
    assert " of 40 rows (" in err
    assert "running 8" in err
    assert " left" in err
    points = json.loads(next(ran.state.glob("samples-*.json")).read_text())
    assert max(point["running"] for point in points) == 8
    assert [p["settled"] for p in points] == sorted(p["settled"] for p in points)


def test_the_engine_is_kept_full(run, write_rows, tmp_path, monkeypatch):
    lengths = np.clip(np.random.default_rng(0).lognormal(3.0, 0.9, 2400), 4, 200).astype(int).tolist()
    rows = [{"id": f"r{i}", "prompt": "x", "sampling_params": {"max_tokens": n}} for i, n in enumerate(lengths)]
    (tmp_path / "slots").mkdir()
    monkeypatch.setenv("SHOAL_STUB_OCCUPANCY", str(tmp_path / "slots"))
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.02")  # so long that a busy machine keeps up
    ran = run(write_rows(rows), engine={"max_num_seqs": 64, "max_num_batched_tokens": 2048})
    assert [row["num_generated_tokens"] for row in ran.rows()] == lengths
    (note,) = (tmp_path / "slots").iterdir()
    admitted, seconds, share = note.read_text().split()
    assert int(admitted) == len(lengths)
    assert float(share) >= 0.9, f"{share} of the slots over {seconds} s"
