"""`shoal plan`: what a job would do, found out without a GPU, an engine or Ray."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from shoal.driver.bench.floors import ITEM_BYTES
from shoal.driver.cli_options import add_engine_options, add_field_options
from shoal.driver.jobs.commands.run_batch import JOB_DEST, job_config, model_finder
from shoal.driver.jobs.config import USELESS, JobConfig
from shoal.driver.jobs.outcome import Exit

if TYPE_CHECKING:
    from shoal.driver.jobs.model import MakeModel
    from shoal.driver.jobs.plan.survey import Survey
    from shoal.workers.models.spec import ModelSpec

_ROWS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `shoal plan`."""
    parser.add_argument("what", nargs="+", metavar="IN", help="the input as `shoal run-batch -i` takes it, or JOB.yaml")
    parser.add_argument("--model", metavar="M", help="local folder, one .gguf file, or a hub id")
    parser.add_argument("-o", "--output", metavar="OUT", help="not needed, and never written to")
    parser.add_argument("--card", metavar="NAME", help="GPU to plan for, H100 or H200: its memory and its floors")
    parser.add_argument("--like", metavar="RUN", help="an earlier job (its output or state): its rate and mean output")
    parser.add_argument(
        "--output-tokens", type=float, metavar="X", help="tokens a row generates on average (default: as --like, else "
        "every row is taken to reach its max_tokens)"
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=int, default=_ROWS, metavar="N", help=f"rows to tokenize; the rest is taken to be like them "
        f"(default: {_ROWS})"
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    group = parser.add_argument_group("job options", "as of `shoal run-batch`")
    add_field_options(group, JobConfig, {"input", "output", "engine"}, JOB_DEST)
    add_engine_options(parser, hidden=USELESS)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. 3 where run-batch would refuse the input."""
    from shoal.driver.jobs.plan.show import show

    is_job = len(args.what) == 1 and args.what[0].endswith((".yaml", ".yml"))
    args.job, args.input = (args.what[0], None) if is_job else (None, args.what)
    if args.output is None and not is_job:
        args.output = "plan.jsonl"
    for name in ("rows", "output_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    config = job_config(args)
    plan = make_plan(config, args)
    print(json.dumps(plan, indent=1) if args.json else show(plan))
    return Exit.INVALID_INPUT if plan["rows"]["stops_the_job"] else Exit.COMPLETED


def make_plan(config: JobConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Everything `--json` prints."""
    from shoal.driver.jobs.plan import estimate
    from shoal.driver.jobs.report.numbers import gather, load_runs
    from shoal.driver.jobs.report.write import find_state

    card = None if args.card is None else estimate.find_card(args.card)
    like: dict[str, Any] | None = None
    if args.like is not None:
        store, _ = find_state(args.like)
        like = gather(store, load_runs(store))
        store.close()
    form, spec, dtype, found = _look(config, model_finder(args), args.rows, on_gpu=card is not None)
    mean: float | None = args.output_tokens
    if mean is None and like is not None:
        mean = like["lengths"]["output"].get("mean")
    made = estimate.outputs(found.asked, mean)
    fit = estimate.memory(config.engine, spec, dtype, None if card is None else card[2])
    ranks = config.engine.tensor_parallel_size * config.engine.pipeline_parallel_size
    fit |= {"device": "CPU" if card is None else f"{ranks} x {card[0]}"} | _need(found, made, fit)
    times = []
    if card is not None:
        item_bytes = ITEM_BYTES[dtype]
        engines = 1 if config.replicas == "auto" else config.replicas
        seconds = estimate.floor_seconds(found, made, spec, card[1], fit, item_bytes, engines, ranks)
        on = f"{engines} engine(s) on {fit['device']} each"
        times.append({"rests_on": f"floor of {on} (driver/bench/floors.py): at least", "seconds": round(seconds, 2)})
    if like is not None:
        seconds = estimate.like_seconds(found, made, like)
        times.append({"rests_on": f"rate of {args.like} ({like['model']})", "seconds": round(seconds, 2)})
    return {
        "model": config.engine.model,
        "dtype": dtype,
        "input": config.input,
        "form": form,
        "rows": _rows(config, found),
        "prompt": _prompt(found),
        "output": {
            "tokens": round(sum(made) * found.scale),
            "mean": round(sum(made) / len(made), 1) if made else 0.0,
            "rests_on": "max_tokens of every row" if mean is None else f"a mean of {mean:g}",
        },
        "kv_cache": fit,
        "estimates": times,
    }


def _look(config: JobConfig, find: MakeModel, most_tokenized: int, on_gpu: bool) -> tuple[str, ModelSpec, str, Survey]:
    """The input's form, the model's numbers and dtype, and what is in the input."""
    from shoal.driver.jobs.files import with_columns
    from shoal.driver.jobs.forms.base import make_form
    from shoal.driver.jobs.identity import job_identity, salt
    from shoal.driver.jobs.keys import RowKeys
    from shoal.driver.jobs.own_files import job_inputs
    from shoal.driver.jobs.plan.survey import survey
    from shoal.driver.jobs.scan import detect_form
    from shoal.driver.model_config import resolve_dtype

    files = job_inputs(config)
    name = detect_form(files, config.max_line_bytes) if config.form == "auto" else config.form
    form = make_form(name, config)
    files = with_columns(files, form.reads())
    model = find(config.engine)
    model.check(config.sampling_params)
    spec, gguf = model.resolved.spec, model.resolved.load.load_format == "gguf"
    dtype = resolve_dtype(config.engine.dtype, spec, "cuda" if on_gpu else "cpu", gguf)
    keys = RowKeys(salt(job_identity(config, name, files, model.resolved)))
    return name, spec, dtype, survey(config, form, files, keys, model.tools(), most_tokenized)


def _need(found: Survey, made: list[int], fit: dict[str, Any]) -> dict[str, Any]:
    """What rows take of the KV cache."""
    tokens = sum(one.prompt - one.shared for one in found.asked) + sum(made)
    need = tokens / len(made) if made else 0.0
    return {
        "tokens_a_row": round(need, 1),
        "longest_row": found.longest,
        "longest_prompt": max((one.prompt for one in found.asked), default=0),
        "rows_at_once": int(min(fit["max_num_seqs"], fit["kv_tokens"] // max(1.0, need))),
        "rows_that_never_fit": sum(one.prompt >= fit["kv_tokens"] for one in found.asked),
    }


def _rows(config: JobConfig, found: Survey) -> dict[str, Any]:
    return {
        "read": found.num_rows,
        "complete": found.complete,
        "tokenized": found.num_tokenized,
        "usable": found.num_usable,
        "refused": sum(found.refused.values()),
        "refused_by_code": dict(found.refused),
        "refused_rows": found.listed,
        "stops_the_job": found.refused_by_reading > 0 and config.on_invalid == "stop",
        "duplicates": found.duplicates,
    }


def _prompt(found: Survey) -> dict[str, Any]:
    from shoal.driver.jobs.report.numbers import lengths

    tokens, shared = sum(one.prompt for one in found.asked), sum(one.shared for one in found.asked)
    histogram = [[value, count] for value, count in sorted(found.lengths.items())]
    about = lengths(histogram, {"prompt": tokens}, "prompt")
    share = round(shared / tokens, 4) if tokens else 0.0
    return about | {"tokens": round(tokens * found.scale), "shared_prefix_share": share}
