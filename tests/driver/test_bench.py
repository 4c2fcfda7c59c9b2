"""What `shoal bench throughput` runs, and the floors it compares with: against published figures and by hand."""

import itertools
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shoal.driver.bench.floors import (
    Ceilings,
    attention_flops,
    decode_kv_bytes,
    decode_seconds,
    head_params,
    kv_bytes_per_token,
    layer_params,
    prefill_seconds,
    serial_floor,
)
from shoal.driver.bench.models import CONFIGS, model_spec
from shoal.driver.bench.throughput import floor_of
from shoal.driver.bench.workloads import MAX_TOKEN_ID, WORKLOADS, BenchRequest, get_workload

ROOT = Path(__file__).resolve().parents[2]
H100 = Ceilings(3.35e12, 800e12, 550e12)
H200 = Ceilings(4.80e12, 800e12, 550e12)


def draw(name, **changes):
    work = get_workload(name, **changes)
    return work.draw(work)


# ---- workloads ---------------------------------------------------------------------------------------------------


def test_nano_is_nano_vllms_benchmark():
    requests = draw("nano")
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    assert [r.prompt for r in requests] == prompts
    assert [r.num_output for r in requests] == lengths
    assert (sum(map(len, prompts)), sum(lengths)) == (142_827, 133_966)
    assert WORKLOADS["nano"].temperature == 0.6


def test_dense_and_decode_have_one_shape():
    assert {(len(r.prompt), r.num_output) for r in draw("dense")} == {(1024, 128)}
    assert {(len(r.prompt), r.num_output) for r in draw("decode", num_requests=8)} == {(128, 1024)}
    assert len(draw("dense")) == 512


def test_longtail_is_lognormal():
    requests = draw("longtail", num_requests=4000)
    lengths = np.array([r.num_output for r in requests])
    assert lengths.min() >= 16
    assert lengths.max() == 3000
    inside = np.log(lengths[(lengths > 16) & (lengths < 3000)])
    assert np.median(inside) == pytest.approx(5.5, abs=0.08)
    assert np.quantile(inside, 0.8413) - np.median(inside) == pytest.approx(1.0, abs=0.1)
    prompts = np.array([len(r.prompt) for r in requests])
    assert (prompts.min(), prompts.max()) == (32, 512)
    assert len(draw("longtail")) == 400
    assert {r.num_output for r in draw("longtail", output_mu=1000.0, num_requests=5)} == {3000}
    rng = random.Random(0)
    few = draw("longtail", num_requests=5)
    for _ in few:
        for _ in range(rng.randint(32, 512)):
            rng.randint(0, MAX_TOKEN_ID)
    assert [r.num_output for r in few] == [min(max(round(rng.lognormvariate(5.5, 1)), 16), 3000) for _ in few]


def test_prefixes_are_shared_and_shuffled():
    requests = draw("prefix")
    groups = {}
    for request in requests:
        assert (len(request.prompt), request.num_output, request.prefix_len) == (2112, 64, 2048)
        groups.setdefault(request.prefix, set()).add(tuple(request.prompt[:2048]))
    assert len(requests) == 1024
    assert sorted(groups) == list(range(32))
    assert all(len(texts) == 1 for texts in groups.values())
    assert len(set.union(*groups.values())) == 32
    assert [r.prefix for r in requests] != [i % 32 for i in range(1024)]
    assert sum(a.prefix == b.prefix for a, b in itertools.pairwise(requests)) < 100


@pytest.mark.parametrize("name", WORKLOADS)
def test_seeds_and_ids(name):
    few = {"num_requests": 5}
    first = draw(name, **few)
    assert draw(name, **few) == first
    assert draw(name, workload_seed=1, **few) != first
    assert 0 <= min(min(r.prompt) for r in first) <= max(max(r.prompt) for r in first) <= MAX_TOKEN_ID
    assert all(CONFIGS[model]["vocab_size"] > MAX_TOKEN_ID for model in CONFIGS)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nanno", {}, "unknown workload 'nanno', known: nano, dense, .*; did you mean 'nano'"),
        ("nano", {"num_prefixes": 2}, "workload 'nano' has no num_prefixes, got num_prefixes=2"),
        ("dense", {"output_mu": 2.0}, "has no output_mu"),
        ("nano", {"num_requests": 0}, "num_requests must be at least 1, got 0"),
        ("nano", {"input_len": (0, 5)}, "input_len must be MIN:MAX with 1 <= MIN <= MAX, got 0:5"),
        ("nano", {"output_len": (9, 5)}, "got 9:5"),
        ("longtail", {"output_sigma": -1.0}, "output_sigma must be at least 0, got -1.0"),
        ("longtail", {"output_sigma": math.nan}, "output_sigma must be a finite number, got nan"),
        ("longtail", {"output_mu": math.inf}, "output_mu must be a finite number, got inf"),
        ("nano", {"temperature": 3.0}, r"temperature must be in \[0, 2\], got 3.0"),
    ],
)
def test_wrong_workloads(name, changes, message):
    with pytest.raises(ValueError, match=message):
        get_workload(name, **changes)


# ---- floors ------------------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    qwen, llama = model_spec("qwen3-0.6b"), model_spec("llama-3.1-8b")
    # 28 layers: q and o 1024 x 2048, k and v 1024 x 1024, three of 1024 x 3072
    assert layer_params(qwen) == 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072) == 440_401_920
    assert head_params(qwen) == 151_936 * 1024
    assert (kv_bytes_per_token(qwen, 2), kv_bytes_per_token(llama, 2)) == (114_688, 131_072)
    assert layer_params(llama) == pytest.approx(6.979e9, rel=1e-3)
    assert attention_flops(qwen, 10) == 4 * 28 * 16 * 128 * 10
    requests = [BenchRequest([1] * 5, 4), BenchRequest([1] * 9, 1)]
    assert decode_kv_bytes(qwen, requests, 2) == (6 + 7 + 8) * 114_688  # the first token comes out of the prompt


@pytest.mark.parametrize(
    ("model", "card", "context", "rows", "milliseconds"),
    [
        ("qwen3-0.6b", H100, 256, 32, 0.64),
        ("qwen3-0.6b", H100, 1024, 128, 4.87),
        ("qwen3-0.6b", H100, 4096, 128, 18.3),
        ("qwen3-0.6b", H200, 1024, 512, 13.4),
        ("llama-3.1-8b", H100, 256, 32, 4.81),
        ("llama-3.1-8b", H100, 1024, 256, 15.1),
        ("llama-3.1-8b", H200, 4096, 32, 6.71),
    ],
)
def test_decode_step(model, card, context, rows, milliseconds):
    seconds = sum(decode_seconds(model_spec(model), card, rows, rows * context, 2))
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=6e-3)


@pytest.mark.parametrize(
    ("model", "rates"),
    [("qwen3-0.6b", (866, 761, 512, 221)), ("llama-3.1-8b", (57, 56, 52, 40))],
)
def test_prefill(model, rates):
    for num_tokens, rate in zip((256, 1024, 4096, 16384), rates, strict=True):
        seconds = prefill_seconds(model_spec(model), H100, num_tokens)
        assert num_tokens / seconds / 1e3 == pytest.approx(rate, abs=0.51 + 0.002 * rate)
        # In two chunks it is the same work.
        half = num_tokens // 2
        spec = model_spec(model)
        parts = prefill_seconds(spec, H100, half) + prefill_seconds(spec, H100, num_tokens, half)
        assert parts == pytest.approx(seconds)


def floor(name, card, *, max_rows=1024, kv_tokens=10**9):
    work, requests = WORKLOADS[name], draw(name)
    spec = model_spec(work.model)
    return serial_floor(spec, card, requests, item_bytes=2, max_rows=max_rows, kv_tokens=kv_tokens)


def test_floor_of_nano():
    found = floor("nano", H100)
    parts = (found.prefill_s, found.weights_s, found.kv_s, found.logits_s)
    assert parts == pytest.approx((0.18, 0.37, 4.14, 0.02), abs=0.006)
    assert found.seconds == pytest.approx(4.70, abs=0.006)
    assert found.num_steps == 1023  # the longest output has 1024 tokens
    assert 133_966 / floor("nano", H200).seconds == pytest.approx(39_800, rel=2e-3)


def test_floors_with_measured_rates_of_an_h100():
    card = Ceilings(3.03e12, 790e12, 790e12)
    assert 133_966 / floor("nano", card).seconds == pytest.approx(26_000, rel=0.01)
    # 80 GB hold 397,000 tokens beside the weights of 8B: 345 of the 512 rows at once.
    assert 512 * 128 / floor("dense", card, kv_tokens=397_000).seconds == pytest.approx(4_689, rel=0.01)
    assert 1024 * 64 / floor("prefix", card, kv_tokens=397_000).seconds == pytest.approx(15_833, rel=0.01)


def test_floor_of_rows_that_do_not_fit_at_once():
    spec = model_spec("llama-3.1-8b")
    requests = [BenchRequest([0] * 1000, 1000)] * 201
    # 201 rows of 2000 tokens fit; 1000 of them take five such rounds: one is the floor of the first.
    one = serial_floor(spec, H100, requests, item_bytes=2, max_rows=1000, kv_tokens=402_000)
    five = serial_floor(spec, H100, requests * 5, item_bytes=2, max_rows=1000, kv_tokens=402_500)
    assert one.num_steps == 999
    assert five.num_steps == 5 * 999
    assert five.seconds == pytest.approx(5 * one.seconds)
    assert 1005 * 1000 / five.seconds == pytest.approx(10_103, rel=0.01)  # as published for 1000/1000
    assert 1005 * 1000 / five.overlapped_seconds == pytest.approx(17_012, rel=0.25)


def test_floor_counts_shared_prefixes_once():
    spec = model_spec("tiny")
    card = Ceilings(1e9, 1e12, 1e12)

    def of(requests, kv_tokens=10**6):
        return serial_floor(spec, card, requests, item_bytes=4, max_rows=8, kv_tokens=kv_tokens)

    prompt = [7] * 40
    shared = [BenchRequest(prompt, 3, prefix=0, prefix_len=32) for _ in range(4)]
    alone = [BenchRequest(prompt, 3) for _ in range(4)]
    per_token = kv_bytes_per_token(spec, 4) / 1e9
    # Two steps; own contexts are 9 and 10 tokens, the prefix is read once a step.
    assert of(shared).kv_s == pytest.approx((2 * 32 + 4 * (9 + 10)) * per_token)
    assert of(alone).kv_s == pytest.approx(4 * (41 + 42) * per_token)
    assert of(shared).prefill_s < of(alone).prefill_s / 2
    # 32 + 4 x 11 tokens: with the prefix kept once all four fit, one token less and they do not.
    assert (of(shared, 76).num_steps, of(shared, 75).num_steps) == (2, 4)
    assert of([BenchRequest([1, 2], 1)]).num_steps == 0


def test_floor_of_an_opt_has_two_matrices_in_the_mlp():
    opt = SimpleNamespace(
        architecture="OPTForCausalLM", hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=4, num_layers=1,
        intermediate_size=32, vocab_size=100, word_embed_proj_dim=4,
    )  # fmt: skip
    assert layer_params(opt) == 4 * 8 * 8 + 2 * 8 * 32
    assert head_params(opt) == 400


def test_printed_floors():
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "floors.py")], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    nano = [line.split() for line in result.stdout.splitlines() if line.startswith("nano")]
    assert [row[2] for row in nano] == ["28,476", "39,818"]
    for wrong in (["--attention-tflops", "400"], ["--read-gb-per-s", "0", "--product-tflops", "1", "--memory-gb", "1"]):
        command = [sys.executable, str(ROOT / "benchmarks" / "floors.py"), *wrong]
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == 2


def test_each_replica_has_its_share_and_its_own_weights():
    """Two replicas take as long as one with half the requests; the slower card counts."""
    rates = {"read_bytes_per_s": 3e12, "copy_bytes_per_s": 3e12, "matmul_flops_per_s": 7e14}
    resolved = SimpleNamespace(dtype="bfloat16", max_num_seqs=256, kv_cache_tokens=1 << 20)
    llm = SimpleNamespace(model_config=model_spec("qwen3-0.6b"), resolved=resolved, get_world_size=lambda include_dp: 1)
    requests = [BenchRequest([1] * 512, 128)] * 64
    one, half = (floor_of(llm, some, [rates]).seconds for some in (requests, requests[:32]))
    assert floor_of(llm, requests, [rates, rates]).seconds == half > one / 2
    slow = rates | {"read_bytes_per_s": 1e12}
    assert floor_of(llm, requests, [rates, slow]).seconds > half
