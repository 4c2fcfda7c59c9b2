"""`shoal bench throughput` on a tiny model, its peers, and how it says what is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.driver.bench.command import _complete
from shoal.driver.bench.models import CONFIGS, model_folder
from shoal.driver.bench.peer import PeerError, get_peer, run_peer
from shoal.driver.bench.throughput import check_lengths
from shoal.driver.bench.workloads import BenchRequest, get_workload
from shoal.driver.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--model", "tiny", "--num-requests", "6", "--input-len", "8:24", "--output-len", "4:12")

# ---- peers -------------------------------------------------------------------------------------------------------

FAKE_VLLM = """
__version__ = "0.0.test"

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        assert ignore_eos and not detokenize and temperature == 0.6
        self.max_tokens = max_tokens

class Output:
    def __init__(self, token_ids):
        self.outputs, self.token_ids = [self], token_ids

class LLM:
    def __init__(self, model, *, load_format, skip_tokenizer_init, max_num_seqs, **rest):
        assert load_format == "dummy" and skip_tokenizer_init and max_num_seqs == 7, rest
        assert rest == dict(dtype="float32", max_model_len=64, tensor_parallel_size=1, enable_prefix_caching=True)
        self.resets = 0

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, params, use_tqdm):
        return [Output([1] * (p.max_tokens + SHORT)) for p, q in zip(params, prompts) if q["prompt_token_ids"]]
"""
JOB = {
    "model": "unused", "load_format": "dummy", "device": "cpu", "dtype": "float32", "max_model_len": 64,
    "tensor_parallel_size": 1, "enable_prefix_caching": True, "temperature": 0.6, "num_runs": 2,
    "arguments": {"max_num_seqs": 7},
}  # fmt: skip
REQUESTS = [BenchRequest([1, 2, 3], 5), BenchRequest([4], 2)]


def test_vllm_peer_speaks_vllms_api(tmp_path, monkeypatch):
    """Against a stand-in with vLLM's signatures: what is passed, and that lengths are checked."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "vllm.py").write_text(FAKE_VLLM.replace("SHORT", "0"))
    peer = get_peer("vllm", sys.executable, JOB["arguments"])
    result = run_peer(peer, sys.executable, JOB, REQUESTS)
    assert result["version"] == "0.0.test"
    for run in result["runs"]:
        assert run["output_tokens_per_s"] * run["seconds"] == pytest.approx(7)
        assert run["total_tokens_per_s"] * run["seconds"] == pytest.approx(11)
    (tmp_path / "vllm.py").write_text(FAKE_VLLM.replace("SHORT", "-1"))
    with pytest.raises(RuntimeError, match="request 0 has 4 output tokens, and not 5"):
        run_peer(peer, sys.executable, JOB, REQUESTS)
    (tmp_path / "vllm.py").write_text("raise OSError('no driver')")
    with pytest.raises(PeerError, match=r"vllm_peer.py ended with status 1"):
        run_peer(peer, sys.executable, JOB, REQUESTS)


def test_peers_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="unknown peer 'vlm', known: vllm, transformers; did you mean 'vllm'"):
        get_peer("vlm", sys.executable, {})
    with pytest.raises(ValueError, match="--peer-python"):
        get_peer("vllm", str(tmp_path / "python"), {})
    bare = tmp_path / "bare"  # an interpreter that finds nothing but its own library
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ValueError, match=r"no module 'vllm'\. Install it: pip install vllm"):
        get_peer("vllm", str(bare), {})


def test_lengths_are_checked():
    check_lengths(REQUESTS, [5, 2])
    with pytest.raises(RuntimeError, match="request 1 has 3 output tokens, and not 2"):
        check_lengths(REQUESTS, [5, 3])


def test_model_folders(tmp_path, monkeypatch):
    with model_folder("tiny") as folder:
        assert json.loads((Path(folder) / "config.json").read_text())["hidden_size"] == 64
    assert not Path(folder).exists()
    with model_folder("org/name") as name:
        assert name == "org/name"
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    with model_folder("tiny") as name:
        assert name == "tiny"


# ---- the command -------------------------------------------------------------------------------------------------


def bench(*arguments, cwd, path=None):
    paths = os.pathsep.join(map(str, [ROOT] if path is None else [ROOT, path]))
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "shoal", "bench", "throughput", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def test_command_end_to_end(tmp_path):
    options = ("--quiet", "--profile-seconds", "0.3", "--max-num-seqs", "4", "--workload-seed", "3")
    peer = ("--peer", "transformers", "--peer-args", '{"batch_size": 4}')
    done = bench(*SMALL, *options, *peer, "--output", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    work = get_workload("nano", num_requests=6, input_len=(8, 24), output_len=(4, 12), workload_seed=3)
    requests = work.draw(work)
    num_output = sum(r.num_output for r in requests)
    assert result["workload"]["num_output_tokens"] == num_output
    assert result["workload"]["num_input_tokens"] == sum(len(r.prompt) for r in requests)
    assert result["engine"]["max_num_seqs"] == 4
    assert result["engine"]["dtype"] == "float32"
    assert result["versions"]["shoal"]
    assert result["ranks"][0]["torch"]
    assert result["startup_s"] > 0
    assert len(result["runs"]) == 2
    for run in [*result["runs"], *result["peer"]["runs"]]:
        assert run["output_tokens_per_s"] * run["seconds"] == pytest.approx(num_output)
        assert run["share_of_floor"] == pytest.approx(result["floor"]["seconds"] / run["seconds"])
    for run in result["runs"]:
        assert 1 < run["mean_batch"] <= 4
        assert run["num_cached_prompt_tokens"] == 0, "the second run reuses the first one's prefixes"
        assert run["kv_read_gb_per_s"] > 0
    assert result["run1_over_run2"] == pytest.approx(result["runs"][0]["seconds"] / result["runs"][1]["seconds"])
    floor = result["floor"]
    assert floor["seconds"] == pytest.approx(sum(floor[f"{p}_s"] for p in ("prefill", "weights", "kv", "logits")))
    assert floor["seconds"] < min(run["seconds"] for run in result["runs"])
    assert result["rates"][0]["read_bytes_per_s"] > 1e8
    profile = result["profile"]
    assert profile["num_rows"] == 4
    assert profile["seconds"] > 0.03
    assert 0 < profile["idle_share"] < 1
    assert any("linear" in kernel["name"] for kernel in profile["kernels"])
    for word in ("run 2", "transformers 2", "output tok/s", "floor", "start-up", "4 rows decoding"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "nanno"), "unknown workload 'nanno'"),
        (("--output", "no/such/folder.json"), "there is no folder"),
        (("--replicas", "2", "--profile-seconds", "1"), "a profile is of one engine, and --replicas is 2"),
        (("--replicas", "0"), 'replicas must be a number from 1 on, or "auto", got'),
        (("--profile-seconds", "-1"), r"--profile-seconds must be in \[0, 60\], got -1.0"),
        (("--peer-args", "{}x"), "no JSON"),
        (("--peer-args", '{"a": 1}'), "there is no --peer"),
        (("--peer", "transformers", "--peer-args", '{"batch": 1}'), "transformers takes batch_size, and not batch"),
        (
            ("--peer", "transformers", "--peer-args", '{"batch_size": 0}'),
            "batch_size must be a number from 1 on, got 0",
        ),
        (("--disable-log-stats",), "leave it out"),
        (("--output", "."), "that is a folder, name a file in it"),
        (("--pipeline-parallel-size", "2", "--profile-seconds", "1"), "stages decode rows of their own"),
        (("--max-model-len", "24"), r"a request has \d+ prompt tokens and .*: more than max_model_len \(24\)"),
        (("--input-len", "5:"), "must be a number or MIN:MAX, got '5:'"),
        (("--max-num-seqs", "many"), "max_num_seqs: .*many"),
        (("--input-len", "a:b"), "must be a number or MIN:MAX, got 'a:b'"),
        (("--max-num-seq", "3"), "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["bench", "throughput", *SMALL, *arguments])
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)


def test_profiled_rows_fit_the_cache():
    from shoal.driver.bench.profile import _fitting

    plain = [BenchRequest([1] * 10, 5)] * 8
    assert len(_fitting(plain, 30, 120)) == 3
    assert len(_fitting(plain, 30, 119)) == 2
    assert len(_fitting(plain, 30, 1)) == 1
    shared = [BenchRequest([1] * 10, 5, prefix=0, prefix_len=8)] * 8
    assert len(_fitting(shared, 30, 104)) == 3  # 40, and 32 for each one more
    assert len(_fitting(shared, 30, 103)) == 2


def test_models_that_are_short_or_know_few_ids(tmp_path):
    """A limit below what a benchmark would else prepare for, and a vocabulary below what prompts hold."""
    requests = [BenchRequest([1] * 10, 5), BenchRequest([1] * 900, 124)]
    config = CONFIGS["tiny"] | {"max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _complete({}, str(tmp_path), str(tmp_path), requests)["max_model_len"] == 2048
    assert _complete({"max_model_len": 1024}, str(tmp_path), str(tmp_path), requests)["max_model_len"] == 1024
    with pytest.raises(ValueError, match=r"900 prompt tokens and 124 to generate, 1024 in all: .*\(1023\)"):
        _complete({"max_model_len": 1023}, str(tmp_path), str(tmp_path), requests)
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1000}))
    with pytest.raises(ValueError, match=r"1024 in all: more than max_model_len \(1000\)"):
        _complete({}, str(tmp_path), str(tmp_path), requests)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10000}))
    with pytest.raises(ValueError, match="ids up to 10000, and the model's vocabulary 10000 ids"):
        _complete({}, str(tmp_path), str(tmp_path), requests)


def test_stages_are_measured_without_a_profile(tmp_path):
    done = bench(*SMALL, "--quiet", "--pipeline-parallel-size", "2", "--output", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "profile" not in json.loads((tmp_path / "out.json").read_text())


def test_what_fails_after_the_runs_leaves_their_figures(tmp_path):
    """No time for a profile, and a peer that ends."""
    (tmp_path / "vllm.py").write_text("raise OSError('no driver')")
    options = ("--quiet", "--profile-seconds", "5", "--max-model-len", "36", "--peer", "vllm")
    done = bench(*SMALL, *options, "--output", "out.json", cwd=tmp_path, path=tmp_path)
    assert done.returncode == 1
    assert "vllm_peer.py ended with status 1" in done.stderr.splitlines()[-1] + done.stderr.splitlines()[-2]
    assert "run 2" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["runs"]) == 2
    assert "profile" in result
