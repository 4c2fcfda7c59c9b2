"""Clauses 3 and 13 with a model that computes: a rank dies in the middle of a step; tokens are accounted for."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import transformers

from shoal.driver.jobs.config import make_job
from shoal.driver.jobs.job import run_job
from shoal.driver.jobs.outcome import Exit

ROWS = [{"id": f"r{i}", "prompt": f"prompt {i}, and some words"} for i in range(60)]
FIELDS = {"dtype": "float32", "max_num_seqs": 8, "max_model_len": 128, "device": "cpu", "decode_burst": 1}


@pytest.fixture
def run_real(ray_cluster, tiny_checkpoint, tmp_path):
    def call(source, name, **changes):
        engine = {"model": tiny_checkpoint("llama"), **FIELDS, **changes.pop("engine", {})}
        sampling = {"max_tokens": 40, "ignore_eos": True}
        made = {"input": source, "output": str(tmp_path / name), "sampling_params": sampling, "engine": engine}
        return run_job(make_job({**made, **changes}))

    return call


@pytest.mark.contract
def test_a_rank_that_dies_in_a_step_changes_no_answer(run_real, write_rows, tmp_path, load_job, processes):
    """Clause 3. Every prompt comes twice; those that come first are answered before anything dies."""
    wishes = [{"temperature": 0.9, "seed": i} if i % 2 else {"temperature": 0.0} for i in range(40)]
    rows = [
        {"id": f"{when}{i}", "prompt": ROWS[i]["prompt"], "sampling_params": wish}
        for when in ("quiet", "broken") for i, wish in enumerate(wishes)
    ]  # fmt: skip
    ran, answered = load_job(tmp_path / "out.jsonl"), set()

    def kill_in_the_middle():
        ran.wait_for(52)
        answered.update(meta["id"] for meta in ran.records("ok"))
        os.kill(sorted(processes.named("ray::Worker"))[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_in_the_middle)
    thread.start()
    engine = {"tensor_parallel_size": 2, "enable_prefix_caching": False}  # the second time as much is computed
    assert run_real(write_rows(rows), "out.jsonl", engine=engine) == Exit.COMPLETED
    thread.join()
    assert {f"quiet{i}" for i in range(40)} <= answered
    assert len(answered) < 72, "rows were at work when the rank died"
    assert ran.report()["engines"]["deaths"] == 1
    texts = {row["id"]: row["generated_text"] for row in ran.rows()}
    assert list(texts) == [row["id"] for row in rows]
    assert [texts[f"broken{i}"] for i in range(40)] == [texts[f"quiet{i}"] for i in range(40)]
    tokens = ran.report()["tokens"]
    assert tokens["generated"] == tokens["committed"] + tokens["wasted"]


@pytest.mark.contract
def test_usage_is_what_the_tokenizer_counts(run_real, write_rows, tmp_path, load_job, tiny_checkpoint):
    """Clause 13."""
    ran = load_job(tmp_path / "a.jsonl")
    stopping = threading.Timer(0, lambda: (ran.wait_for(10), os.kill(os.getpid(), signal.SIGTERM)))
    stopping.start()
    source = write_rows(ROWS)
    assert run_real(source, "a.jsonl", drain_s=20) == Exit.TERMINATED
    stopping.join()
    before = ran.report()["tokens"]
    assert run_real(source, "a.jsonl", token_ids=False) == Exit.COMPLETED
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    for row in ran.rows():
        assert row["num_input_tokens"] == len(tokenizer(row["prompt"])["input_ids"])
        assert row["num_generated_tokens"] == 40
    tokens = ran.report()["tokens"]
    assert tokens["committed"] == 40 * len(ROWS) > before["committed"] > 0
    assert tokens["prompt"] == sum(row["num_input_tokens"] for row in ran.rows())
    assert tokens["generated"] == tokens["committed"] + tokens["wasted"] >= before["generated"]
