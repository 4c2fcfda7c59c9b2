"""Steps tried before the first one leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from shoal import SamplingParams
from shoal.workers.warm_up import try_steps

PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, seed=3, max_tokens=9, ignore_eos=True, logprobs=2),
]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_after_tried_steps_are_as_ever(family, tiny_checkpoint, local_llm) -> None:
    found = []
    for tried in (False, True):
        llm = local_llm(tiny_checkpoint(family), device="cpu", max_num_seqs=4)
        runner = llm.llm_engine.runner
        if tried:
            with torch.inference_mode():
                try_steps(runner)
            assert runner.state.num_tokens[:2].tolist() == [runner.config.block_size + 2] * 2
            assert runner.kv_cache[0][:, 1, 0].abs().amax(dim=(1, 2)).gt(0).all(), "no step was run"
        outputs = llm.generate([[5, 6, 7], [8] * 20], PARAMS, use_tqdm=False)
        found.append([(list(o.outputs[0].token_ids), o.outputs[0].logprobs) for o in outputs])
    assert found[0] == found[1]


def test_nothing_is_tried_without_room(tiny_checkpoint, local_llm) -> None:
    for limits in ({"max_num_seqs": 1}, {"num_gpu_blocks_override": 3, "max_model_len": 32}):
        llm = local_llm(tiny_checkpoint("llama"), device="cpu", **limits)
        runner = llm.llm_engine.runner
        with torch.inference_mode():
            try_steps(runner)
        assert not runner.state.num_tokens.any()
