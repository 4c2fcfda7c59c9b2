"""`shoal bench throughput`: how fast the engine answers a workload, beside what the device could do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from shoal.driver.bench.models import CONFIGS, model_folder
from shoal.driver.bench.report import collect_versions, print_table
from shoal.driver.bench.throughput import add_ceilings, floor_of, run_workload
from shoal.driver.bench.workloads import WORKLOADS, BenchRequest, Workload, get_workload
from shoal.driver.cli_options import add_engine_options, engine_arguments
from shoal.driver.llm import LLM
from shoal.workers import measure

_ROUND = 1024  # max_model_len is made a multiple of it
_LEAST_LEN = 4096
_SIZES = ("num_requests", "input_len", "output_len", "output_mu", "output_sigma", "num_prefixes", "prefix_len",
          "temperature", "workload_seed")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `shoal bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    about = "Runs a workload twice, with the prefix cache reset in between, on random weights and token ids."
    throughput = kinds.add_parser("throughput", help="tokens per second", description=about, allow_abbrev=False)
    listing = "; ".join(f"{name}: {work.summary}" for name, work in WORKLOADS.items())
    throughput.add_argument("--workload", default="nano", metavar="NAME", help=listing + " (default: nano)")
    throughput.add_argument(
        "--model", metavar="NAME", help=f"{', '.join(CONFIGS)}, a folder or a hub id (default: the workload's own)"
    )
    throughput.add_argument("--output", type=Path, metavar="FILE.json", help="write all figures there")
    throughput.add_argument("--quiet", action="store_true", help="no progress bars")
    sizes = throughput.add_argument_group("sizes of the workload", "what is not given is as the workload has it")
    sizes.add_argument("--num-requests", type=int, metavar="N", default=argparse.SUPPRESS)
    for name, what in (("input", "of prompts, a shared prefix not counted"), ("output", "of outputs")):
        sizes.add_argument(
            f"--{name}-len", type=_length_range, metavar="MIN[:MAX]", default=argparse.SUPPRESS, help=f"tokens {what}"
        )
    sizes.add_argument(
        "--output-mu", type=float, metavar="X", default=argparse.SUPPRESS, help="of longtail's lognormal"
    )
    sizes.add_argument("--output-sigma", type=float, metavar="X", default=argparse.SUPPRESS, help="the same")
    sizes.add_argument("--num-prefixes", type=int, metavar="N", default=argparse.SUPPRESS, help="of prefix")
    sizes.add_argument("--prefix-len", type=int, metavar="N", default=argparse.SUPPRESS, help="of prefix, in tokens")
    sizes.add_argument("--temperature", type=float, metavar="X", default=argparse.SUPPRESS)
    sizes.add_argument(
        "--workload-seed", type=int, metavar="N", default=argparse.SUPPRESS, help="of prompts and lengths"
    )
    add_engine_options(throughput)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes."""
    work = get_workload(args.workload, **{name: getattr(args, name) for name in _SIZES if hasattr(args, name)})
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {args.output.absolute().parent}")
    requests = work.draw(work)
    with model_folder(args.model or work.model) as folder:
        arguments = _defaults(requests) | engine_arguments(args)
        result = _measure(folder, arguments, work, requests, show_bar=not args.quiet)
    result = {"workload": _describe(args.workload, work, requests), "model": args.model or work.model} | result
    print_table(result)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def _measure(
    folder: str, arguments: dict[str, Any], work: Workload, requests: list[BenchRequest], show_bar: bool
) -> dict[str, Any]:
    started_at = time.time()
    start = time.perf_counter()
    with LLM(folder, **arguments) as llm:
        startup_s = time.perf_counter() - start
        ranks = llm.collective_rpc(measure.describe_rank)
        runs = [run_workload(llm, requests, work.temperature, show_bar) for _ in range(2)]
        # After the runs: the device is as warm as it was for them, and the first run finds nothing prepared.
        rates = llm.collective_rpc(measure.measure_rates)
        ceilings = add_ceilings(rates)
        floor = floor_of(llm, requests, ceilings)
        num_output = sum(request.num_output for request in requests)
        return {
            "started_at": started_at,
            "engine": dataclasses.asdict(llm.resolved) | {"arguments": arguments},
            "versions": collect_versions(),
            "ranks": ranks,
            "startup_s": startup_s,
            "rates": rates,
            "floor": dataclasses.asdict(floor)
            | {"seconds": floor.seconds, "output_tokens_per_s": num_output / floor.seconds},
            "runs": [dataclasses.asdict(one) | {"share_of_floor": floor.seconds / one.seconds} for one in runs],
            "run1_over_run2": runs[0].seconds / runs[1].seconds,
        }


def _defaults(requests: list[BenchRequest]) -> dict[str, Any]:
    """Engine arguments that a benchmark sets unless told otherwise."""
    longest = max(len(request.prompt) + request.num_output for request in requests)
    length = max(_LEAST_LEN, -(-longest // _ROUND) * _ROUND)
    return {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": length}


def _describe(name: str, work: Workload, requests: list[BenchRequest]) -> dict[str, Any]:
    sizes = {field: value for field in _SIZES if (value := getattr(work, field)) is not None}
    return {"name": name} | sizes | {
        "num_input_tokens": sum(len(request.prompt) for request in requests),
        "num_output_tokens": sum(request.num_output for request in requests),
    }  # fmt: skip


def _length_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or MIN:MAX, got {text!r}") from error
