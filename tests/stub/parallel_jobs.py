"""Jobs for parallel_rank.py, and what runs them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

SCRIPT = pathlib.Path(__file__).with_name("parallel_rank.py")
ROTARY = {"num_attention_heads": 8, "num_key_value_heads": 2}  # on four ranks each KV head is held by two
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": ROTARY | {"attention_bias": True, "mlp_bias": True},
    "qwen3": ROTARY,
    "granite": ROTARY,
    "gpt2": {},
    "opt": {},
    "opt-post-norm": {},
}


def run_ranks(jobs: list[dict[str, Any]], tmp_path: pathlib.Path, world_size: int) -> list[dict[str, Any]]:
    """Each job's result, from `world_size` processes that run all jobs."""
    for index, job in enumerate(jobs):
        job["init"] = f"file://{tmp_path}/job-{index}"
    output = tmp_path / "results.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])}
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(world_size)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            command = [sys.executable, str(SCRIPT), str(rank), json.dumps(jobs), str(output)]
            ranks.append(subprocess.Popen(command, env=environment, stderr=file))
    # One that fails takes the others along: their links to it break. One that hangs says where, and ends.
    codes = [rank.wait() for rank in ranks]
    assert not any(codes), "\n".join(log.read_text()[-6000:] for log in logs)
    results: list[dict[str, Any]] = json.loads(output.read_text())
    return results


def job(folder: str, layout: tuple[int, int], **changes: Any) -> dict[str, Any]:
    stages = layout[1]
    settings: dict[str, Any] = {
        "device": "cpu",
        "rows": 14,
        "num_blocks": 160,
        "max_num_batched_tokens": 48,
        "burst": 4 if stages == 1 else 1,
    }
    return settings | {"folder": folder, "layout": layout, "lookahead": stages + 1} | changes
