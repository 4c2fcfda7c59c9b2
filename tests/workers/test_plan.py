"""Frames between driver and ranks carry everything, and never pickle."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from shoal.workers.plan import NewRow, RowSampling, SchedulerOutput, StepOutput, TokenLogprobs, decode_frame


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_plan_round_trip() -> None:
    sampling = RowSampling(
        temperature=0.1 + 0.2,
        top_k=3,
        stream=2**64 - 1,
        stop_ids=(1, 2),
        logit_bias=((7, -1.5),),
        bad_words=((1, 2), (3,)),
        num_logprobs=-1,
        extra_args={"a": [1, "x"]},
    )
    plan = SchedulerOutput(
        9,
        int32(4, 0),
        int32(1, 5),
        np.array([1, 0], np.uint8),
        int32(8, 1),
        8,
        [NewRow(4, int32(5, 6, 7), 2, 0, sampling), NewRow(0, int32(8), 1, 0, RowSampling())],
        int32(4),
        int32(0),
        int32(77),
    )
    back = SchedulerOutput.decode(plan.encode())
    assert (back.step_id, back.num_steps) == (9, 8)
    for name in ("rows", "num_scheduled_tokens", "samples", "row_steps", "block_rows", "block_positions", "block_ids"):
        assert getattr(back, name).tolist() == getattr(plan, name).tolist(), name
    assert [(n.row, n.token_ids.tolist(), n.num_prompt_tokens, n.num_computed_tokens) for n in back.new_rows] == [
        (4, [5, 6, 7], 2, 0),
        (0, [8], 1, 0),
    ]
    assert [n.sampling for n in back.new_rows] == [sampling, RowSampling()]


def test_output_round_trip() -> None:
    entry = TokenLogprobs(int32(1, 2).reshape(1, 2), np.array([[-0.5, -1e-9]], np.float32), int32(2))
    output = StepOutput(3, int32(1, -1, 5, 6).reshape(2, 2), {1: entry}, {0: (4, entry)})
    back = StepOutput.decode(output.encode())
    assert back.token_ids.tolist() == [[1, -1], [5, 6]]
    assert back.logprobs[1].logprobs.tolist() == entry.logprobs.tolist()
    start, prompt = back.prompt_logprobs[0]
    assert (start, prompt.ids.tolist(), prompt.ranks.tolist()) == (4, [[1, 2]], [2])


def test_a_pickle_is_not_a_frame() -> None:
    with pytest.raises(ValueError, match=r".*"):
        decode_frame(pickle.dumps({"rows": [1]}))
