"""Other engines on the same requests. A peer is a program in peers/ and one row in PEERS.

It runs in a process of its own, of any Python that has it installed: it gets a job as JSON, imports nothing of Shoal,
and writes its result as JSON.
"""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.driver.bench.throughput import check_lengths
from shoal.driver.bench.workloads import BenchRequest


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine to compare with."""

    module: str  # what must be importable
    program: str  # in peers/
    install: str
    options: tuple[str, ...] | None = None  # what --peer-args may hold, numbers from 1 on; None: the peer checks it


class PeerError(RuntimeError):
    """The peer failed; our own figures stand."""


PEERS = {
    "vllm": Peer("vllm", "vllm_peer.py", "pip install vllm"),
    "transformers": Peer("transformers", "transformers_peer.py", "pip install torch transformers", ("batch_size",)),
}


def get_peer(name: str, python: str, arguments: Mapping[str, Any]) -> Peer:
    """The peer of that name; ValueError if there is none, that Python does not have it, or it does not take these."""
    if name not in PEERS:
        near = difflib.get_close_matches(name, PEERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown peer {name!r}, known: {', '.join(PEERS)}{hint}")
    peer = PEERS[name]
    if peer.options is not None:
        _check_options(name, peer.options, arguments)
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.module!r}) is None)"
    try:
        found = subprocess.run([python, "-c", code], timeout=60).returncode == 0
    except OSError as error:
        raise ValueError(f"--peer-python {python}: {error}") from error
    if not found:
        raise ValueError(f"--peer {name}: {python} has no module {peer.module!r}. Install it: {peer.install}")
    return peer


def _check_options(name: str, known: Sequence[str], given: Mapping[str, Any]) -> None:
    for option, value in given.items():
        if option not in known:
            raise ValueError(f"--peer-args: {name} takes {', '.join(known)}, and not {option}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"--peer-args: {option} must be a number from 1 on, got {value!r}")


def run_peer(peer: Peer, python: str, job: dict[str, Any], requests: Sequence[BenchRequest]) -> dict[str, Any]:
    """Two runs of the peer; figures as ours. PeerError if it fails, RuntimeError if an output has another length."""
    rows = {"prompts": [r.prompt for r in requests], "num_outputs": [r.num_output for r in requests]}
    with tempfile.TemporaryDirectory(prefix="shoal-peer-") as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps(job | rows))
        program = Path(__file__).parent / "peers" / peer.program
        # stdout is for our table: what the peer prints goes to stderr.
        done = subprocess.run([python, str(program), str(job_file), str(result_file)], stdout=sys.stderr)
        if done.returncode:
            raise PeerError(f"{peer.program} ended with status {done.returncode}; what it said is above")
        result: dict[str, Any] = json.loads(result_file.read_text())
    num_input, num_output = sum(len(r.prompt) for r in requests), sum(r.num_output for r in requests)
    for run in result["runs"]:
        check_lengths(requests, run.pop("lengths"))
        seconds = run["seconds"]
        run["output_tokens_per_s"] = num_output / seconds
        run["total_tokens_per_s"] = (num_input + num_output) / seconds
        run["requests_per_s"] = len(requests) / seconds
    return result
