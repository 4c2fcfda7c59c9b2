"""One rank of engines that differ in how a model is split: `parallel_rank.py RANK JOBS OUTPUT`.

JOBS is a JSON list of jobs, run one after the other; a rank beyond a job's world sits it out. Every rank runs the same
scheduler over the outputs of the one that would answer the driver. Rank 0 writes what each job's rows became.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers

from shoal import SamplingParams
from shoal.driver.draft import SchedulerLimits
from shoal.driver.forecast import Admission
from shoal.driver.request import EngineRequest
from shoal.driver.scheduler import Scheduler
from shoal.kernels.registry import use_implementation
from shoal.workers import runner as runner_module
from shoal.workers.config import LoadConfig, WorkerConfig
from shoal.workers.models.spec import ModelSpec
from shoal.workers.parallel import TensorParallel
from shoal.workers.pipeline import Pipeline, Stage
from shoal.workers.plan import SchedulerOutput, StepOutput
from shoal.workers.runner import ModelRunner

BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS = 16, 128, 16
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9}
# What the rows ask for: rows that stop early, look at all logits, or remember what they have said.
WISHES = [
    GREEDY,
    SEEDED,
    SEEDED | {"stop_token_ids": list(range(3, 384, 9))},
    GREEDY | {"logprobs": 2, "prompt_logprobs": 1},
    SEEDED | {"top_k": 9, "top_p": 0.9},
    GREEDY | {"repetition_penalty": 1.4, "presence_penalty": 0.3},
]


def requests(count: int) -> list[EngineRequest]:
    made = []
    for number in range(count):
        wish = WISHES[number % len(WISHES)]
        prompt = [3 + (7 * number + 5 * j) % 300 for j in range(1 + 11 * number % 47)]
        params = SamplingParams(max_tokens=6 + number * 5 % 17, ignore_eos=True, **wish)
        stops = tuple(wish.get("stop_token_ids", ()))
        made.append(EngineRequest(number, prompt, params, stops, stream=977 * number + 1))
    return made


def join(job: dict[str, Any], rank: int) -> TensorParallel:
    (tp_size, stages), device = job["layout"], job["device"]
    return TensorParallel.init(rank, tp_size * stages, job["init"], device, 120.0, stages)


def build(job: dict[str, Any], rank: int, tp: TensorParallel) -> ModelRunner:
    (tp_size, stages), device = job["layout"], job["device"]
    use_implementation("triton" if device == "cuda" else "reference")
    spec = ModelSpec.from_hf(transformers.AutoConfig.from_pretrained(job["folder"]))
    torch_device = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    pipeline = Pipeline.init(Stage(rank // tp_size, stages), tp.rank, tp_size, torch_device)
    config = WorkerConfig(
        spec, LoadConfig(job["folder"]), rank, tp_size * stages, device, job.get("dtype", "float32"), BLOCK_SIZE,
        MAX_MODEL_LEN, MAX_NUM_SEQS, job["max_num_batched_tokens"], job.get("enforce_eager", False), 1, stages,
        job.get("disable_custom_all_reduce", False),
    )  # fmt: skip
    Admission.lets_in = lambda self, *_: True  # a small cache then makes preemptions
    runner_module._OVERLAP_TOKENS = job.get("overlap_tokens", 1 << 30)
    runner = ModelRunner(config, tp, (), pipeline)
    runner.load()
    runner.allocate_kv(job["num_blocks"])
    return runner


def run(job: dict[str, Any], rank: int, tp: TensorParallel) -> dict[str, Any]:
    tp_size, stages = job["layout"]
    answering = tp_size * (stages - 1)
    tp.peers = None  # the last job's
    runner = build(job, rank, tp)
    limits = SchedulerLimits(
        MAX_MODEL_LEN, MAX_NUM_SEQS, job["max_num_batched_tokens"], job["num_blocks"], BLOCK_SIZE, job["burst"],
        num_lanes=stages,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    for request in requests(job["rows"]):
        scheduler.add(request)
    inflight: deque[Any] = deque()
    rows: dict[int, Any] = {}
    overlapping = 0
    while scheduler.num_unfinished:
        while len(inflight) <= job["lookahead"] and (plan := scheduler.schedule()) is not None:
            if inflight:
                overlapping += not np.isin(plan.output.rows, inflight[-1][0].output.rows).any()
            inflight.append((plan, runner.execute(SchedulerOutput.decode(plan.output.encode()))))
        plan, pending = inflight.popleft()
        box = [pending.wait().encode()]
        if tp_size * stages > 1:
            dist.broadcast_object_list(box, src=answering)
        for done in scheduler.update(plan, StepOutput.decode(box[0])):
            prompt = [done.prompt_logprobs[start] for start in sorted(done.prompt_logprobs)]
            logprobs = [line for entry in [*done.logprobs, *prompt] for line in entry.ids.tolist()]
            rows[done.source.number] = [done.token_ids[done.num_prompt_tokens :], done.finish_reason, logprobs]
    peers = tp.peers
    return {
        "rows": [rows[number] for number in sorted(rows)],
        "preemptions": scheduler.stats.num_preemptions,
        "overlapping": overlapping,
        "block_bytes": runner.block_bytes(),
        "peers": peers is not None,
        "sums_beside": -1 if peers is None or peers.overlap is None else peers.overlap.num_sums,
        "graphs": 0 if runner.graphs is None else len(runner.graphs._graphs),
    }


def main() -> None:
    rank, jobs, output = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    faulthandler.dump_traceback_later(float(os.environ.get("SHOAL_TEST_HANGS_S", 500)), exit=True)
    torch.set_num_threads(1)
    results: list[Any] = []
    layout, tp = None, TensorParallel()
    for job in jobs:
        if rank >= job["layout"][0] * job["layout"][1]:
            continue
        started = time.monotonic()
        if job["device"] == "cuda":
            torch.cuda.set_device(rank)
        if job["layout"] != layout:
            tp.destroy()
            layout, tp = job["layout"], join(job, rank)
        with torch.inference_mode():
            results.append(run(job, rank, tp))
        print(f"rank {rank}: {job} took {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    tp.destroy()
    if rank == 0:
        with open(output, "w", encoding="utf-8") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
