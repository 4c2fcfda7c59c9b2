"""How full a pipeline keeps its engine: the share of slots at work until only the last max_num_seqs rows are left.

    python benchmarks/occupancy.py                    # stub ranks, lognormal lengths, 256 and 1024 slots
    python benchmarks/occupancy.py --model MODEL      # wall time of both ways beside one LLM.generate, real model

Both ways in: `build_processor` on a Dataset, and `shoal run-batch`. Driver actor, scheduler and step channel are the
real ones; a stub rank takes --step-s for each decode step of the whole batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

from shoal.driver.jobs.model import RowModel

WAYS = ("build_processor", "run-batch")


class TimedModel(RowModel):
    """Says in a file when its engine was ready: a pipeline's start-up is not what is measured."""

    def starter(self, solo_deaths, silence_s=None):
        start, ready = super().starter(solo_deaths, silence_s), os.environ["SHOAL_ENGINE_READY"]

        def begin(place=None):
            engine = start(place)
            Path(ready).write_text(str(time.time()))
            return engine

        return begin


def stub_ranks():
    path = Path(__file__).resolve().parents[1] / "tests/stub/stub_ranks.py"
    spec = importlib.util.spec_from_file_location("stub_ranks", path)
    sys.modules["stub_ranks"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


def pipeline(model_class, engine: dict, rows: list[dict]) -> list[dict]:
    """All rows through build_processor."""
    import ray.data

    from shoal.driver.data import processor

    processor.RowModel = model_class
    dataset = ray.data.from_items(rows)
    return processor.build_processor({"engine": engine})(dataset).take_all()


def job(model_class, engine: dict, rows: list[dict], folder: Path) -> list[dict]:
    """All rows through run-batch."""
    from shoal.driver.jobs.config import make_job
    from shoal.driver.jobs.job import run_job

    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {"input": str(folder / "in.jsonl"), "output": str(folder / "out.jsonl"), "engine": engine}
    assert run_job(make_job({**made, "progress_s": 600}), model_class.find) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def run(way: str, model_class, engine: dict, rows: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as name:
        found = (
            job(model_class, engine, rows, Path(name)) if way == "run-batch" else pipeline(model_class, engine, rows)
        )
    assert len(found) == len(rows)
    assert not any(row["error"] for row in found), next(row["error"] for row in found if row["error"])


def occupancy(slots: int, rounds: int, step_s: float, folder: Path) -> None:
    module = stub_ranks()
    model = folder / "model"
    model.mkdir(exist_ok=True)
    lengths = np.clip(np.random.default_rng(0).lognormal(3.9, 0.9, rounds * slots), 4, 600).astype(int).tolist()
    rows = [
        {"id": f"r{i}", "prompt": f"prompt {i}", "sampling_params": {"max_tokens": n, "ignore_eos": True}}
        for i, n in enumerate(lengths)
    ]
    engine = {"model": module.make_model(model), "max_num_seqs": slots, "max_num_batched_tokens": 8192}
    os.environ["SHOAL_STUB_STEP_S"] = str(step_s)
    for way in WAYS:
        notes = folder / f"{way}-{slots}"
        notes.mkdir()
        os.environ["SHOAL_STUB_OCCUPANCY"] = str(notes)
        run(way, module.StubModel, engine, rows)
        (note,) = notes.iterdir()
        admitted, seconds, share = note.read_text().split()
        print(f"{way}, {slots} slots, {len(rows)} rows of {np.mean(lengths):.0f} tokens (most {max(lengths)}): "
              f"{float(share):.1%} full for {seconds} s, until {admitted} rows were admitted", flush=True)  # fmt: skip


def beside_generate(model: str, count: int, folder: Path) -> None:
    from shoal import LLM, SamplingParams

    os.environ["SHOAL_ENGINE_READY"] = str(folder / "ready")
    ray.cloudpickle.register_pickle_by_value(sys.modules[TimedModel.__module__])
    engine = {"model": model, "max_model_len": 1024, "max_num_seqs": 32}
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"r{i}", "prompt": f"Question {i}: what is {i} times {i + 3}? " * int(rng.integers(1, 6)),
         "sampling_params": {"max_tokens": int(n), "ignore_eos": True, "temperature": 0.0}}
        for i, n in enumerate(np.clip(rng.lognormal(3.0, 0.8, count), 4, 150))
    ]  # fmt: skip
    with LLM(**engine) as llm:
        began = time.time()
        params = [SamplingParams(**row["sampling_params"]) for row in rows]
        llm.generate([row["prompt"] for row in rows], params, use_tqdm=False)
        base = time.time() - began
    print(f"LLM.generate: {base:.1f} s for {count} rows", flush=True)
    for way in WAYS:
        run(way, TimedModel, engine, rows)
        wall = time.time() - float((folder / "ready").read_text())
        print(f"{way}: {wall:.1f} s from the engine's start to the last row, {wall / base:.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=12, help="rows for each slot")
    parser.add_argument("--step-s", type=float, default=0.03)
    parser.add_argument("--model", help="a real model, for wall times instead")
    parser.add_argument("--rows", type=int, default=96, help="with --model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-occupancy-") as name:
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING")
        if args.model:
            beside_generate(args.model, args.rows, Path(name))
            return
        for slots in args.slots:
            occupancy(slots, args.rounds, args.step_s, Path(name))


if __name__ == "__main__":
    main()
