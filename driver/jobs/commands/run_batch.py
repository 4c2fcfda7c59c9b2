"""`shoal run-batch`: a batch job from flags, from a YAML file, or from a file with flags laid over it."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from typing import Any

from shoal.driver.cli_options import add_engine_options, add_field_options, engine_arguments
from shoal.driver.config import EngineConfig
from shoal.driver.jobs.config import USELESS, JobConfig, load_job, make_job
from shoal.driver.jobs.model import MakeModel, RowModel
from shoal.driver.torch_free import keep_torch_out

JOB_DEST = "job."  # keeps a job's fields apart from a command's own arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `shoal run-batch`."""
    parser.add_argument("job", nargs="?", metavar="JOB.yaml", help="a job file; flags go before its fields")
    parser.add_argument("-i", "--input", nargs="+", metavar="IN", help=JobConfig.model_fields["input"].description)
    parser.add_argument("-o", "--output", metavar="OUT", help=JobConfig.model_fields["output"].description)
    parser.add_argument("--model", metavar="M", help="local folder, one .gguf file, or a hub id")
    group = parser.add_argument_group("job options", "what is not given keeps its default, or what the job file says")
    add_field_options(group, JobConfig, {"input", "output", "engine"}, JOB_DEST)
    add_engine_options(parser, hidden=USELESS)


def job_config(args: argparse.Namespace) -> JobConfig:
    """The job that the arguments describe. ValueError where they describe none."""
    changes: dict[str, Any] = {k.removeprefix(JOB_DEST): v for k, v in vars(args).items() if k.startswith(JOB_DEST)}
    changes |= {name: value for name in ("input", "output") if (value := getattr(args, name)) is not None}
    engine = engine_arguments(args)
    if args.model is not None:
        engine["model"] = args.model
    if args.job is not None:
        return load_job(args.job, {**changes, "engine": engine})
    for name, flag in (("input", "-i"), ("output", "-o")):
        if name not in changes:
            raise ValueError(f"{name} is missing: give {flag}, or a job file")
    return make_job({**changes, "engine": engine})


def model_finder(args: argparse.Namespace) -> MakeModel:
    """RowModel.find, without torch where the process is the command's own: it computes nothing."""
    return _find_lightly if args.own_process else RowModel.find


def _find_lightly(config: EngineConfig) -> RowModel:
    if not config.trust_remote_code:  # a model's own code may expect anything
        keep_torch_out()
    return RowModel.find(config)


def run(args: argparse.Namespace) -> int:
    """Runs the job; its exit code."""
    from shoal.driver.jobs.job import run_job
    from shoal.driver.replica import REPLICA_THREAD

    code = run_job(job_config(args), model_finder(args))
    if any(thread.name.startswith(REPLICA_THREAD) for thread in threading.enumerate()):
        # A stop that did not wait: such a thread would meet a Ray that is shut down, whose core then ends the process
        # with a code of its own.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
