"""Two GPUs share a model: tokens in float32 equal those of one GPU, for every family, however the ranks sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# How layers are split, and what changes: sums in peer memory or by NCCL, in graphs or not, beside products or not.
WAYS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "one": ((1, 1), {"burst": 8}),
    "graphs": ((2, 1), {"burst": 8}),
    "eager": ((2, 1), {"burst": 1, "enforce_eager": True}),
    "nccl": ((2, 1), {"burst": 8, "disable_custom_all_reduce": True}),
    "beside": ((2, 1), {"burst": 8, "overlap_tokens": 16}),
    "stages": ((1, 2), {"burst": 1}),
    "stages-eager": ((1, 2), {"burst": 1, "enforce_eager": True}),
}
ROTARY = {"llama", "qwen3", "granite"}


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "gpt2", "opt", "opt-post-norm"])
def test_float32_equals_one_gpu(family, parallel_jobs, tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint(family, **parallel_jobs.CHECKPOINTS[family])
    jobs = [parallel_jobs.job(folder, layout, device="cuda", **changes) for layout, changes in WAYS.values()]
    results = dict(zip(WAYS, parallel_jobs.run_ranks(jobs, tmp_path, world_size=2), strict=True))
    assert any(row[1] == "stop" for row in results["one"]["rows"])
    for way, result in results.items():
        assert result["rows"] == results["one"]["rows"], way
        assert bool(result["graphs"]) != ("eager" in way), way
    assert results["graphs"]["peers"], "the GPUs of one host do not reach each other's memory"
    assert not results["nccl"]["peers"]
    assert (results["beside"]["sums_beside"] > 0) == (family in ROTARY)
    assert results["graphs"]["sums_beside"] == 0
