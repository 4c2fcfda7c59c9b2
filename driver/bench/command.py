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
from shoal.driver.bench.peer import PEERS, get_peer, run_peer
from shoal.driver.bench.profile import profile_decode
from shoal.driver.bench.report import collect_versions, print_table
from shoal.driver.bench.throughput import floor_of, run_workload
from shoal.driver.bench.workloads import WORKLOADS, BenchRequest, Workload, get_workload
from shoal.driver.cli_options import add_engine_options, engine_arguments, json_object
from shoal.driver.config import Count, check_count
from shoal.driver.llm import LLM
from shoal.workers import measure

_ROUND = 1024  # max_model_len is made a multiple of it
_LEAST_LEN = 4096
_PROFILE_S = 5.0
_MOST_PROFILE_S = 60  # a trace of minutes takes gigabytes
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
    throughput.add_argument(
        "--profile-seconds",
        type=float,
        metavar="X",
        help="length of the profile of full-batch decoding, a third run; 0: none (default: 5; with replicas 0)",
    )
    throughput.add_argument(
        "--replicas", default=1, metavar="N", help='engines that share the requests, or "auto" (default: 1)'
    )
    throughput.add_argument("--peer", metavar="NAME", help=f"run {' or '.join(PEERS)} on the same requests afterwards")
    throughput.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="the Python that has it (default: this one)"
    )
    throughput.add_argument("--peer-args", type=json_object, default={}, metavar="JSON", help="engine arguments for it")
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
    replicas = check_count(args.replicas)
    default = _PROFILE_S if replicas == 1 else 0.0
    profile_s = default if args.profile_seconds is None else args.profile_seconds
    if not 0 <= profile_s <= _MOST_PROFILE_S:
        raise ValueError(f"--profile-seconds must be in [0, {_MOST_PROFILE_S}], got {profile_s}")
    if profile_s and replicas != 1:
        raise ValueError(f"--profile-seconds {profile_s:g}: a profile is of one engine, and --replicas is {replicas}")
    if args.peer_args and args.peer is None:
        raise ValueError(f"--peer-args {json.dumps(args.peer_args)}: there is no --peer that they are for")
    peer = None if args.peer is None else get_peer(args.peer, args.peer_python)
    requests = work.draw(work)
    result: dict[str, Any] = {"workload": _describe(args.workload, work, requests), "model": args.model or work.model}
    with model_folder(args.model or work.model) as folder:
        arguments = _defaults(requests) | engine_arguments(args)
        if arguments.get("disable_log_stats"):
            raise ValueError("--disable-log-stats: a benchmark reports the engine's metrics, leave it out")
        try:
            _measure(result, folder, arguments, replicas, work, requests, profile_s, show_bar=not args.quiet)
            if peer is not None:  # the engine is gone: the device is free
                job = _peer_job(folder, work, result["engine"], args.peer_args)
                theirs = run_peer(peer, args.peer_python, job, requests)
                for one in theirs["runs"]:
                    one["share_of_floor"] = result["floor"]["seconds"] / one["seconds"]
                result["peer"] = {"name": args.peer, "arguments": args.peer_args} | theirs
        finally:  # what was measured before something failed is not lost
            if "runs" in result:
                _publish(result, args.output)
    return 0


def _publish(result: dict[str, Any], file: Path | None) -> None:
    print_table(result)
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {file}", file=sys.stderr)


def _measure(
    result: dict[str, Any],
    folder: str,
    arguments: dict[str, Any],
    replicas: Count,
    work: Workload,
    requests: list[BenchRequest],
    profile_s: float,
    show_bar: bool,
) -> None:
    """Everything about our own engine, added to the result."""
    result["started_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    start = time.perf_counter()
    with LLM(folder, replicas=replicas, **arguments) as llm:
        result["startup_s"] = time.perf_counter() - start
        result["engine"] = dataclasses.asdict(llm.resolved) | {
            "arguments": arguments,
            "replicas": llm.get_world_size() // llm.get_world_size(include_dp=False),
        }
        result["versions"] = collect_versions()
        result["ranks"] = llm.collective_rpc(measure.describe_rank)
        runs = [run_workload(llm, requests, work.temperature, show_bar) for _ in range(2)]
        # After the runs: the device is as warm as it was for them, and the first run finds nothing prepared.
        result["rates"] = llm.collective_rpc(measure.measure_rates)
        floor = floor_of(llm, requests, result["rates"])
        num_output = sum(request.num_output for request in requests)
        result["floor"] = dataclasses.asdict(floor) | {
            "seconds": floor.seconds,
            "overlapped_seconds": floor.overlapped_seconds,
            "output_tokens_per_s": num_output / floor.seconds,
        }
        result["runs"] = [dataclasses.asdict(one) | {"share_of_floor": floor.seconds / one.seconds} for one in runs]
        result["run1_over_run2"] = runs[0].seconds / runs[1].seconds
        if profile_s:
            result["profile"] = profile_decode(llm, requests, work.temperature, profile_s)


def _peer_job(folder: str, work: Workload, engine: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What a peer needs beside the requests; as our engine has it where both know the word."""
    given = engine["arguments"]
    return {
        "model": folder,
        "load_format": given["load_format"],
        "enable_prefix_caching": given.get("enable_prefix_caching", True),
        "temperature": work.temperature,
        "num_runs": 2,
        "arguments": arguments,
    } | {name: engine[name] for name in ("device", "dtype", "max_model_len", "tensor_parallel_size")}


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
