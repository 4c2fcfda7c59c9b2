"""build_processor: the row contract, errors in their column, engines that die, nothing left behind."""

from __future__ import annotations


def rows_of(dataset):
    return sorted(dataset.take_all(), key=lambda row: row["n"])


def test_every_stage_puts_its_errors_into_one_column(build):
    import ray

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

    dataset = ray.data.range(40).rename_columns({"id": "n"})
    found = rows_of(build(preprocess, postprocess, batch_size=16)(dataset))
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
