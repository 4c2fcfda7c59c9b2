"""`shoal bench throughput`: how fast the engine answers a workload, beside what the device could do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from shoal.driver.bench.models import CONFIGS, model_folder, model_spec
from shoal.driver.bench.peer import PEERS, PeerError, get_peer, run_peer
from shoal.driver.bench.profile import NoProfile, profile_decode
from shoal.driver.bench.report import collect_versions, print_table
from shoal.driver.bench.throughput import floor_of, run_workload
from shoal.driver.bench.workloads import MAX_TOKEN_ID, WORKLOADS, BenchRequest, Workload, get_workload
from shoal.driver.cli_options import add_engine_options, engine_arguments, json_object
from shoal.driver.config import Count, check_count, make_config
from shoal.driver.llm import LLM
from shoal.driver.model_config import resolve_model
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
        help="length of the profile of full-batch decoding, a third run; 0: none (default: 5; with replicas or "
        "pipeline stages 0)",
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
    _check_output(args.output)
    replicas, arguments = check_count(args.replicas), engine_arguments(args)
    if arguments.get("disable_log_stats"):
        raise ValueError("--disable-log-stats: a benchmark reports the engine's metrics, leave it out")
    profile_s = _profile_seconds(args.profile_seconds, replicas, arguments)
    if args.peer_args and args.peer is None:
        raise ValueError(f"--peer-args {json.dumps(args.peer_args)}: there is no --peer that they are for")
    peer = None if args.peer is None else get_peer(args.peer, args.peer_python, args.peer_args)
    requests = work.draw(work)
    model = args.model or work.model
    result: dict[str, Any] = {"workload": _describe(args.workload, work, requests), "model": model}
    with model_folder(model) as folder:
        try:
            start = time.perf_counter()
            arguments = _complete(arguments, model, folder, requests)
            _measure(result, folder, arguments, replicas, work, requests, profile_s, start, show_bar=not args.quiet)
            if peer is not None:  # the engine is gone: the device is free
                job = _peer_job(folder, work, result["engine"], args.peer_args)
                theirs = run_peer(peer, args.peer_python, job, requests)
                for one in theirs["runs"]:
                    one["share_of_floor"] = result["floor"]["seconds"] / one["seconds"]
                result["peer"] = {"name": args.peer, "arguments": args.peer_args} | theirs
        except PeerError as error:
            print(f"shoal bench: {error}", file=sys.stderr)
            return 1
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
    start: float,
    show_bar: bool,
) -> None:
    """Everything about our own engine, added to the result; `start`: when its start-up began, by time.perf_counter."""
    result["started_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
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
            try:
                result["profile"] = profile_decode(llm, requests, work.temperature, profile_s)
            except NoProfile as error:  # the runs' figures stand without it, and so does what comes after
                result["profile"] = {"error": str(error)}


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


def _check_output(file: Path | None) -> None:
    """Before anything is measured: a file can be written there."""
    if file is None:
        return
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--output {file}: there is no folder {folder}")
    if file.is_dir():
        raise ValueError(f"--output {file}: that is a folder, name a file in it")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ValueError(f"--output {file}: cannot be written")


def _profile_seconds(given: float | None, replicas: Count, arguments: dict[str, Any]) -> float:
    """How long to profile: not at all where engines, or stages with rows of their own, share the rows."""
    stages = str(arguments.get("pipeline_parallel_size", 1))
    seconds = given if given is not None else _PROFILE_S if replicas == 1 and stages == "1" else 0.0
    if not 0 <= seconds <= _MOST_PROFILE_S:
        raise ValueError(f"--profile-seconds must be in [0, {_MOST_PROFILE_S}], got {seconds}")
    if seconds and replicas != 1:
        raise ValueError(f"--profile-seconds {seconds:g}: a profile is of one engine, and --replicas is {replicas}")
    if seconds and stages != "1":
        raise ValueError(
            f"--profile-seconds {seconds:g}: stages decode rows of their own, and --pipeline-parallel-size is {stages}"
        )
    return seconds


def _complete(given: dict[str, Any], name: str, folder: str, requests: list[BenchRequest]) -> dict[str, Any]:
    """Engine arguments with those that a benchmark sets unless told otherwise. ValueError where the model, or the
    max_model_len that was given, cannot hold the requests."""
    arguments: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True} | given
    config = make_config(model=folder, **arguments)
    known = folder != name and config.hf_overrides is None
    spec = model_spec(name) if known else resolve_model(config).spec  # which takes seconds of the start-up
    if spec.vocab_size <= MAX_TOKEN_ID:
        raise ValueError(
            f"prompts have token ids up to {MAX_TOKEN_ID}, and the model's vocabulary {spec.vocab_size} ids"
        )
    longest = max(requests, key=lambda request: len(request.prompt) + request.num_output)
    length = len(longest.prompt) + longest.num_output
    limit = spec.max_position_embeddings if config.max_model_len in (None, -1) else config.max_model_len
    if config.max_model_len is None:
        arguments["max_model_len"] = min(limit, max(_LEAST_LEN, math.ceil(length / _ROUND) * _ROUND))
    if length > limit:
        raise ValueError(
            f"a request has {len(longest.prompt)} prompt tokens and {longest.num_output} to generate, {length} in all: "
            f"more than max_model_len ({limit})"
        )
    return arguments


def _describe(name: str, work: Workload, requests: list[BenchRequest]) -> dict[str, Any]:
    sizes = {field: value for field in _SIZES if (value := getattr(work, field)) is not None}
    return {"name": name} | sizes | {
        "num_input_tokens": sum(len(request.prompt) for request in requests),
        "num_output_tokens": sum(request.num_output for request in requests),
    }  # fmt: skip


def _length_range(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    try:
        return int(low), int(high if colon else low)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or MIN:MAX, got {text!r}") from error
