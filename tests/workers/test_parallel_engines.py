"""Every family split over tensor-parallel ranks and pipeline stages, as processes linked by gloo, against one rank."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.workers.models.spec import ModelSpec

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]  # tensor-parallel ranks, pipeline stages (of 2 and 1 layers)


def test_every_family_in_every_layout(parallel_jobs, tiny_checkpoint, tmp_path) -> None:
    job, checkpoints = parallel_jobs.job, parallel_jobs.CHECKPOINTS
    jobs = [
        job(tiny_checkpoint(family, **changes), layout) for family, changes in checkpoints.items() for layout in LAYOUTS
    ]
    # Rows thrown out and computed anew, and bursts through stages.
    llama = tiny_checkpoint("llama", **checkpoints["llama"])
    jobs += [job(llama, (1, 1)), job(llama, (1, 2), num_blocks=9), job(llama, (1, 2), burst=4), job(llama, (1, 3))]
    results = parallel_jobs.run_ranks(jobs, tmp_path, world_size=4)
    expected: Any = None
    for each, result in zip(jobs, results, strict=True):
        if each["layout"] == (1, 1):
            expected = result
            assert len(expected["rows"]) == each["rows"]
            assert any(row[1] == "stop" for row in expected["rows"])
        assert result["rows"] == expected["rows"], each
        assert result["preemptions"] > 0 or each["num_blocks"] > 9
        if each["layout"][1] > 1:
            assert result["overlapping"] > 5, "consecutive plans shared rows: stages would wait for each other"
            assert result["block_bytes"] < expected["block_bytes"]


def test_what_cannot_be_split_is_refused() -> None:
    spec = ModelSpec(
        architecture="LlamaForCausalLM", model_type="llama", vocab_size=10, hidden_size=8, num_layers=3, num_heads=4,
        num_kv_heads=4, head_dim=2, intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    assert [list(spec.stage_layers(stage, 2)) for stage in range(2)] == [[0, 1], [2]]
    with pytest.raises(ValueError, match=r"layers \(3\) must be at least the pipeline parallel size \(4\)"):
        spec.check_pipeline_parallel(4)
    with pytest.raises(ValueError, match=r"attention heads \(4\) must be divisible by tensor parallel size \(3\)"):
        spec.check_tensor_parallel(3)
    with pytest.raises(ValueError, match="pipeline_parallel_size must be at least 1, got 0"):
        spec.check_pipeline_parallel(0)
