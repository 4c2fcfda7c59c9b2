"""build_processor: the row contract, errors in their column, engines that die, nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.data


def rows_of(dataset):
    return sorted(dataset.take_all(), key=lambda row: row["n"])


def test_every_stage_puts_its_errors_into_one_column(build):
    def preprocess(row):
        if row["n"] == 1:
            raise KeyError("no such thing")
        if row["n"] == 2:
            return {"messages": [{"role": "user", "content": "hello"}]}
        if row["n"] == 3:
            return {"messages": [{"content": "nobody says this"}]}
        if row["n"] == 4:
            return {"prompt": "x " * 400}
        if row["n"] == 5:
            return {}
        sampling = {6: {"temperature": -1.0}, 7: {"n": 3, "logprobs": 2}, 8: {"nonsense": 1}}.get(row["n"], {})
        return {"prompt": f"prompt {row['n']}", "sampling_params": sampling, "kept": row["n"] * 2}

    def postprocess(row):
        if row["n"] == 9:
            raise ValueError("cannot be used")
        return row

    found = rows_of(build(preprocess, postprocess, batch_size=16)(prompts(40)))
    assert [row["n"] for row in found] == list(range(40))
    errors = {row["n"]: (row["error"]["stage"], row["error"]["code"]) for row in found if row["error"]}
    assert errors == {
        1: ("preprocess", "preprocess_failed"),
        3: ("template", "invalid_messages"),
        4: ("tokenize", "invalid_prompt"),
        5: ("validate", "missing_column"),
        6: ("parameters", "invalid_parameter"),
        8: ("parameters", "invalid_parameter"),
        9: ("postprocess", "postprocess_failed"),
    }
    assert "no such thing" in found[1]["error"]["message"]
    for n in (1, 3, 4, 5, 6, 8):
        assert found[n]["generated_text"] is None
    good = found[0]
    assert good["kept"] == 0
    assert (good["num_generated_tokens"], good["finish_reason"], good["num_input_tokens"]) == (8, "length", 8)
    assert list(good["prompt_token_ids"])
    assert len(good["generated_tokens"]) == 8
    assert good["num_cached_tokens"] == 0
    assert found[2]["num_generated_tokens"] == 8
    several = found[7]
    assert several["num_generated_tokens"] == 24
    assert [one["index"] for one in several["completions"]] == [0, 1, 2]
    assert several["completions"][0]["text"] == several["generated_text"]
    assert len({one["text"] for one in several["completions"]}) == 3


def alive():
    """Processes of engines, and placement groups. Actors of Ray Data's own end when it lets go of them."""
    from ray.util import placement_group_table

    titles = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            titles.append(path.read_bytes().split(b"\0")[0].decode("utf-8", "replace"))
    engines = [title for title in titles if title.startswith("ray::Stub")]
    return engines, [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def assert_gone():
    deadline = time.monotonic() + 100
    while alive() != ([], []):
        gc.collect()  # a failed run's exception and its frames hold each other, and handles of actors
        assert time.monotonic() < deadline, alive()
        time.sleep(0.1)


def prompts(count):
    return ray.data.range(count).rename_columns({"id": "n"})


def test_engines_die_and_no_row_is_lost_or_twice(build):
    def preprocess(row):
        kill = {"extra_args": {"kill": True}} if row["n"] == 17 else {}
        return {"prompt": f"prompt {row['n']}", "sampling_params": kill}

    found = rows_of(build(preprocess, batch_size=8)(prompts(60)))
    assert [row["n"] for row in found] == list(range(60))
    assert [row["n"] for row in found if row["error"]] == [17]
    assert found[17]["error"]["code"] == "engine_killed"
    assert "alone" in found[17]["error"]["message"]
    assert all(len(row["generated_tokens"]) == 8 for row in found if row["n"] != 17)
    assert_gone()


def test_two_engines_of_two_ranks_fit_two_cpus(build):
    """With the pipeline's own tasks: ranks and actors take hundredths."""
    assert ray.cluster_resources()["CPU"] == 2
    processor = build(lambda row: {"prompt": "x"}, replicas=2, batch_size=8, engine={"tensor_parallel_size": 2})
    found = rows_of(processor(prompts(60)))
    assert [row["n"] for row in found] == list(range(60))
    assert not any(row["error"] for row in found)
    assert_gone()


def test_rows_are_made_ready_and_cut_into_blocks_in_the_same_tasks(build):
    """In tasks of their own, blocks were cut too late for the first rows: 80% of the slots were full, not 97%."""
    done = build(lambda row: {"prompt": "x"}, batch_size=8)(prompts(64)).materialize()
    assert "MapBatches(prepare)->StreamingRepartition" in done.stats()
    assert done.count() == 64


def test_an_engine_that_only_dies_ends_the_pipeline(build):
    processor = build(lambda row: {"prompt": "x"}, max_restarts=1, sampling_params={"extra_args": {"kill": True}})
    with pytest.raises(Exception, match="died"):
        processor(prompts(20)).materialize()
    assert_gone()


def test_a_pipeline_that_is_left_alone_ends_its_engine(build):
    """Consumption that stops early."""
    dataset = build(lambda row: {"prompt": "x" * 5, "sampling_params": {"max_tokens": 50}}, batch_size=4)(prompts(400))
    iterator = iter(dataset.iter_rows())
    assert next(iterator)["error"] is None
    assert alive()[1]
    del iterator
    gc.collect()
    assert_gone()


def test_a_later_stage_that_fails_ends_the_engine(build):
    """Ray Data may keep the engine's actor for as long as the Ray job lasts; it gives the engine back by itself."""

    def fails(row):
        raise RuntimeError("a stage of the user's own")

    dataset = build(lambda row: {"prompt": "x"}, batch_size=4, idle_s=2)(prompts(40)).map(fails)
    with pytest.raises(Exception, match="a stage of the user's own"):
        dataset.materialize()
    assert_gone()


def test_what_cannot_be_placed_is_refused(build):
    with pytest.raises(RuntimeError, match=r"needs 3 CPUs: 1 to read and to tokenize, 2 for 100 engine\(s\) .* has 2"):
        build(replicas=100)(prompts(1))
    processor = build(lambda row: {"prompt": "x"}, engine={"device": "cuda"})
    with pytest.raises(Exception, match=r"needs 1 GPU\(s\); the Ray cluster has 0"):
        processor(prompts(1)).materialize()
    assert_gone()


def test_cpus_that_others_hold_are_waited_for(build, held_cpus):
    """Ray Data would wait for them without a word, and without an end."""
    with held_cpus(1.5), pytest.raises(RuntimeError, match=r"pipeline needs 1\.02 CPUs: .* has 2 in all, 0\.\d+ of"):
        build(lambda row: {"prompt": "x"}, engine={"placement_timeout_s": 1})(prompts(4))
    with held_cpus(1.5, seconds=3):
        found = rows_of(build(lambda row: {"prompt": "x"})(prompts(4)))
    assert [row["error"] for row in found] == [None] * 4


def test_the_same_id_draws_the_same_tokens(build):
    processor = build(lambda row: {"prompt": "same", "id": f"row {row['n'] % 8}"}, batch_size=4)
    found = rows_of(processor(prompts(16)))
    texts = [row["generated_text"] for row in found]
    assert texts[:8] == texts[8:]
    assert len(set(texts)) == 8


def test_wrong_configs_are_refused(build):
    for wrong, said in (
        ({"batch_siez": 4}, "batch_siez"),
        ({"batch_size": 0}, "batch_size"),
        ({"engine": {"max_model_length": 5}}, "did you mean 'max_model_len'"),
        ({"error_column": ""}, "error_column must name a column"),
    ):
        with pytest.raises(ValueError, match=said):
            build(**wrong)


@pytest.mark.soak  # nearly a minute, on a machine with nothing else to do
def test_the_engine_is_kept_full(build, tmp_path, monkeypatch):
    """Slow rows do not hold back others: no batch is waited for. benchmarks/occupancy.py has the full sizes."""
    lengths = np.clip(np.random.default_rng(0).lognormal(3.0, 0.9, 1600), 4, 200).astype(int).tolist()
    monkeypatch.setenv("SHOAL_STUB_OCCUPANCY", str(tmp_path))
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.05")  # tens of seconds: the start of Ray Data's processes counts too

    def preprocess(row):
        return {"prompt": "x", "sampling_params": {"max_tokens": lengths[row["n"]]}}

    processor = build(preprocess, engine={"max_num_seqs": 64, "max_num_batched_tokens": 2048})
    found = rows_of(processor(prompts(len(lengths))))
    assert [row["num_generated_tokens"] for row in found] == lengths
    (note,) = tmp_path.iterdir()
    admitted, seconds, share = note.read_text().split()
    assert int(admitted) == len(lengths)
    assert float(share) >= 0.9, f"{share} of the slots over {seconds} s"
