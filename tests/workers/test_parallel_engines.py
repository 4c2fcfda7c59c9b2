"""Every family split over tensor-parallel ranks and pipeline stages, as processes linked by gloo, against one rank."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from shoal.workers.models.spec import ModelSpec

SCRIPT = pathlib.Path(__file__).parents[1] / "stub" / "parallel_rank.py"
ROTARY = {"num_attention_heads": 8, "num_key_value_heads": 2}  # on four ranks each KV head is held by two
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": ROTARY | {"attention_bias": True, "mlp_bias": True},
    "qwen3": ROTARY,
    "granite": ROTARY,
    "gpt2": {},
    "opt": {},
    "opt-post-norm": {},
}
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]  # tensor-parallel ranks, pipeline stages (of 2 and 1 layers)


def run_ranks(jobs: list[dict[str, Any]], tmp_path: pathlib.Path, world_size: int = 4) -> list[dict[str, Any]]:
    """Each job's result, from `world_size` processes that run all jobs."""
    for index, job in enumerate(jobs):
        job["init"] = f"file://{tmp_path}/job-{index}"
    output = tmp_path / "results.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])}
    command = [sys.executable, str(SCRIPT)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), json.dumps(jobs), str(output)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world_size)
    ]
    errors = []
    for rank in ranks:  # one that fails takes the others along: their links to it break
        _, error = rank.communicate(timeout=600)
        errors += [error] if rank.returncode else []
    assert not errors, "\n".join(errors)
    results: list[dict[str, Any]] = json.loads(output.read_text())
    return results


def job(folder: str, layout: tuple[int, int], **changes: Any) -> dict[str, Any]:
    stages = layout[1]
    settings = {"rows": 14, "num_blocks": 160, "max_num_batched_tokens": 48, "burst": 4 if stages == 1 else 1}
    return settings | {"folder": folder, "layout": layout, "lookahead": stages + 1} | changes


def test_every_family_in_every_layout(tiny_checkpoint, tmp_path) -> None:
    jobs = [
        job(tiny_checkpoint(family, **changes), layout) for family, changes in CHECKPOINTS.items() for layout in LAYOUTS
    ]
    # Rows thrown out and computed anew, and bursts through stages.
    llama = tiny_checkpoint("llama", **CHECKPOINTS["llama"])
    jobs += [job(llama, (1, 1)), job(llama, (1, 2), num_blocks=12), job(llama, (1, 2), burst=4), job(llama, (1, 3))]
    results = run_ranks(jobs, tmp_path)
    expected: Any = None
    for each, result in zip(jobs, results, strict=True):
        if each["layout"] == (1, 1):
            expected = result
            assert len(expected["rows"]) == each["rows"]
            assert any(row[1] == "stop" for row in expected["rows"])
        assert result["rows"] == expected["rows"], each
        assert result["preemptions"] > 0 or each["num_blocks"] > 12
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
