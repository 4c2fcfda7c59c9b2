"""`shoal plan`: what it counts, what it refuses, and what its times rest on."""

import json

import pytest

from shoal.driver.bench.floors import CARDS, kv_bytes_per_token, prefill_seconds
from shoal.driver.cli import main
from shoal.driver.jobs.plan import estimate
from shoal.driver.jobs.plan.survey import Asked
from shoal.driver.model_config import resolve_all


@pytest.fixture
def plan(tiny_checkpoint, write, capsys):
    """plan(lines, *flags) -> (exit code, what was printed); lines None: the flags name the input."""

    def call(lines, *flags):
        source = [] if lines is None else [write("in.jsonl", lines)]
        code = main(["plan", *source, "--model", tiny_checkpoint("llama"), *flags])
        return code, capsys.readouterr()

    return call


def numbers(found):
    return json.loads(found[1].out)


def test_counts(plan):
    lines = [
        {"id": "a", "prompt": "x" * 40},
        {"id": "b", "prompt": "x" * 40},  # what a asks for
        {"id": "c", "prompt": "x" * 40, "sampling_params": {"max_tokens": 5}},
        {"id": "d", "prompt": "x" * 33 + "y" * 7},  # two blocks of 16 in common
        {"id": "e", "prompt": [7, 8, 9], "sampling_params": {"n": 3}},
    ]
    code, out = plan(lines, "--json", "--sampling-params", '{"max_tokens": 20}')
    assert code == 0
    found = json.loads(out.out)
    assert found["rows"] | {"refused_rows": []} == {
        "read": 5, "complete": True, "tokenized": 5, "usable": 5, "refused": 0, "refused_by_code": {},
        "refused_rows": [], "stops_the_job": False, "duplicates": 1,
    }  # fmt: skip
    assert found["prompt"]["tokens"] == 163
    assert found["prompt"]["histogram"] == [[3, 1], [40, 4]]
    assert found["prompt"]["shared_prefix_share"] == round(3 * 32 / 163, 4)
    assert found["output"]["tokens"] == 20 + 20 + 5 + 20 + 60
    assert found["kv_cache"]["longest_row"] == 60
    assert found["estimates"] == []


def test_refused_rows_are_named(plan):
    lines = [
        {"id": "a", "prompt": "hello"},
        "no json",
        {"id": "a", "prompt": "again"},
        {"id": "c", "prompt": "y" * 300},
        {"id": "d", "prompt": "z", "sampling_params": {"temperature": -1}},
        {"id": "e"},
    ]
    code, out = plan(lines)
    assert code == 3, "run-batch would end with it too"
    for text in ("in.jsonl:2: invalid_json", "in.jsonl:3: duplicate_id", "in.jsonl:4: invalid_prompt",
                 "in.jsonl:5: invalid_parameter", "in.jsonl:6: missing_column", "refused            5 ("):  # fmt: skip
        assert text in out.out
    code, out = plan(lines, "--on-invalid", "continue", "--json")
    assert code == 0
    assert json.loads(out.out)["rows"]["refused_by_code"]["duplicate_id"] == 1


def test_parameters_of_the_job_that_the_model_cannot_have(plan):
    """No row could be answered: no row's error, but the job's, before anything starts."""
    for sampling, said in (
        ('{"logprobs": 50}', "sampling_params: Requested sample logprobs of 50, which is greater than max allowed: 20"),
        ('{"stop_token_ids": [999999]}', "sampling_params: token_id(s) [999999] in stop_token_ids"),
    ):
        code, out = plan([{"prompt": "hello"}], "--sampling-params", sampling)
        assert (code, said in out.err) == (2, True), out.err


def test_rows_beyond_those_tokenized_are_taken_to_be_like_them(plan):
    lines = [{"id": f"r{i}", "prompt": "x" * (10 + i % 2)} for i in range(50)]
    found = numbers(plan(lines, "--json", "--rows", "10", "--output-tokens", "8"))
    assert (found["rows"]["tokenized"], found["rows"]["usable"]) == (10, 50)
    assert found["prompt"]["tokens"] == 525
    assert found["output"] == {"tokens": 400, "mean": 8, "rests_on": "a mean of 8"}
    found = numbers(plan(lines, "--json", "--validate-rows", "20"))
    assert (found["rows"]["read"], found["rows"]["complete"]) == (20, False)


def test_a_card_gives_memory_and_a_floor(plan, tiny_checkpoint):
    from shoal.driver.config import make_config

    lines = [{"id": f"r{i}", "prompt": [i % 90 + 5] * 100, "sampling_params": {"max_tokens": 1}} for i in range(8)]
    found = numbers(plan(lines, "--json", "--card", "h100", "--dtype", "float32"))
    model, _, _ = resolve_all(make_config(model=tiny_checkpoint("llama")))
    spec, (ceilings, memory) = model.spec, CARDS["H100"]
    fit = found["kv_cache"]
    assert fit["kv_bytes_per_token"] == kv_bytes_per_token(spec, 4)
    assert 0.8 * memory < fit["kv_tokens"] * fit["kv_bytes_per_token"] < 0.9 * memory
    assert (fit["max_num_seqs"], fit["device"]) == (1024, "1 x H100")
    (only,) = found["estimates"]
    assert "H100" in only["rests_on"]
    asked = [Asked(100, 0, 1)] * 8
    looked = type("Looked", (), {"asked": asked, "num_usable": 800})()
    seconds = estimate.floor_seconds(looked, [1] * 8, spec, ceilings, fit, 4, 2, 1)
    assert seconds == pytest.approx(prefill_seconds(spec, ceilings, 100) * 800 / 2), "no decoding, two engines"
    with pytest.raises(ValueError, match="did you mean H100"):
        estimate.find_card("h10")


def test_small_memory_is_said(plan):
    lines = [{"id": "a", "prompt": "x" * 100}, {"id": "b", "prompt": "x" * 10}]
    flags = ("--num-gpu-blocks-override", "4", "--sampling-params", '{"max_tokens": 20}')
    found = numbers(plan(lines, "--json", *flags))
    assert found["kv_cache"]["kv_tokens"] == 64
    assert found["kv_cache"]["rows_that_never_fit"] == 1
    assert found["kv_cache"]["rows_at_once"] < 2
    _, out = plan(lines, *flags)
    assert "1 rows do not fit even alone" in out.out
    assert "unknown: name a card" in out.out


def test_a_rate_of_an_earlier_run():
    looked = type("Looked", (), {"asked": [Asked(100, 40, 50)] * 10, "scale": 3.0})()
    report = {"tokens": {"prompt": 900, "cached": 300, "committed": 400}, "time": {"answering_s": 5.0}}
    assert estimate.like_seconds(looked, [40] * 10, report) == pytest.approx(1000 * 3 * 5 / 1000)
    with pytest.raises(ValueError, match="no rate"):
        estimate.like_seconds(looked, [40] * 10, report | {"time": {"answering_s": 0.0}})


def test_a_job_file(plan, write, tmp_path, tiny_checkpoint):
    source = write("rows.jsonl", [{"id": "a", "prompt": "hello"}])
    job = tmp_path / "job.yaml"
    job.write_text(f"input: {source}\noutput: {tmp_path}/out.jsonl\nengine:\n  model: {tiny_checkpoint('llama')}\n")
    code, out = plan(None, str(job), "--json")
    assert code == 0
    assert json.loads(out.out)["rows"]["read"] == 1
    assert not (tmp_path / "out.jsonl.shoal").exists()
    assert plan(None, str(job), "--rows", "0")[0] == 2
