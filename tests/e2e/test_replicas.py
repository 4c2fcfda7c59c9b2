"""Several engines of one LLM, and jobs on clusters whose nodes come and go, on real Ray processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal import LLM, SamplingParams

STUB_CLI = Path(__file__).resolve().parents[1] / "stub" / "stub_cli.py"
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


def outputs_of(llm, prompts, params):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [list(one.prompt_token_ids) for one in outputs] == prompts
    return [list(part.token_ids) for one in outputs for part in one.outputs]


def test_tokens_do_not_depend_on_replicas(ray_cluster, tiny_checkpoint) -> None:
    """Greedy, seeded and unseeded rows, with one engine, with two, and with two of which one dies on the way."""
    prompts = [[3 + i % 5] * 20 + [3 + (7 * i + j) % 200 for j in range(1 + 5 * i % 17)] for i in range(48)]
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, max_tokens=12, n=2, ignore_eos=True),
        SamplingParams(temperature=0.8, max_tokens=12, seed=5, ignore_eos=True),
    ]
    params = [kinds[i % 3] for i in range(len(prompts))]
    arguments = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 128, "enable_sleep_mode": True}
    folder = tiny_checkpoint("llama")
    with LLM(folder, **arguments) as llm:
        expected = outputs_of(llm, prompts, params)
    with LLM(folder, replicas=2, **arguments) as llm:
        assert outputs_of(llm, prompts, params) == expected
        pids = llm.collective_rpc(os_getpid)
        assert llm.get_world_size() == len(set(pids)) == 2
        assert llm.get_world_size(include_dp=False) == 1
        assert counters(llm, {"replica": "1"})["shoal:generation_tokens"] > 0
        llm.sleep(1)
        llm.wake_up()
        assert llm.reset_prefix_cache()
        with pytest.raises(ValueError, match="prompt 1"):
            llm.generate([prompts[0], []], kinds[0], use_tqdm=False)
        bad = llm.generate([prompts[0], [], prompts[1]], kinds[0], use_tqdm=False, on_error="return")
        assert [bool(one.error) for one in bad] == [False, True, False]
        llm.enqueue(prompts, params, use_tqdm=False)
        os.kill(llm.llm_engine.driver_pid(), signal.SIGKILL)  # numbers go on, so unseeded rows draw anew
        again = llm.wait_for_completion(use_tqdm=False)
        assert [one.error for one in again] == [None] * len(prompts)
        kept = [i for i in range(len(prompts)) if i % 3 != 1]
        flat = iter(expected)
        by_row = [[next(flat) for _ in range(params[i].n)] for i in range(len(prompts))]
        for i in kept:
            assert [list(part.token_ids) for part in again[i].outputs] == by_row[i]
        assert counters(llm, {})["shoal:replica_deaths"] == 1


def counters(llm, labels) -> dict[str, float]:
    found = [metric for metric in llm.get_metrics() if metric.labels == labels and hasattr(metric, "value")]
    return {metric.name: metric.value for metric in found}


def os_getpid(worker) -> int:
    return os.getpid()


def test_a_cluster_that_grows_and_shrinks_under_a_job(stub_model, tmp_path) -> None:
    """replicas="auto" on one node; a second node joins: another engine. That node dies: the rest answers its rows."""
    from ray.cluster_utils import Cluster

    rows = [
        {"id": str(i), "prompt": f"row {i}", "sampling_params": {"extra_args": {"length": 30}}} for i in range(1000)
    ]
    source, output, step_s = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "step_s"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    step_s.write_text("0.06")  # one engine would need four minutes: however long another's start takes, rows are left
    memory = {"object_store_memory": 100 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": HEALTH, **memory},
    )
    job = None
    try:
        command = [
            sys.executable, str(STUB_CLI), "run-batch", "-i", str(source), "-o", str(output), "--model",
            stub_model, "--address", cluster.address, "--replicas", "auto", "--max-num-seqs", "8",
            "--max-model-len", "256", "--sampling-params", '{"max_tokens": 64}',
        ]  # fmt: skip
        log = (tmp_path / "job.log").open("w")
        job = subprocess.Popen(
            command, env={**os.environ, "SHOAL_STUB_STEP_S": str(step_s)}, stdout=log, stderr=subprocess.STDOUT
        )
        said = lambda: (tmp_path / "job.log").read_text()  # noqa: E731
        wait_for(lambda: ledger_rows(output) > 20, job, said)
        node = cluster.add_node(num_cpus=2, **memory)
        wait_for(lambda: "replica 1 is added" in said(), job, said)
        wait_for(lambda: said().count("KV cache size") == 2, job, said)  # its engine is up
        before = ledger_rows(output)
        wait_for(lambda: ledger_rows(output) > before + 60, job, said)
        cluster.remove_node(node, allow_graceful=False)
        step_s.with_suffix(".new").write_text("0.005")
        step_s.with_suffix(".new").rename(step_s)
        assert job.wait(120) == 0, said()
    finally:
        if job is not None and job.poll() is None:
            job.kill()
            job.wait()
        cluster.shutdown()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    assert not any(answer.get("error") for answer in answers)


def ledger_rows(output) -> int:
    return sum(path.read_text().count("\n") for path in Path(f"{output}.shoal").glob("ledger-*.jsonl"))


def wait_for(condition, job, said) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert job.poll() is None, said()
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)
