"""report.html: one file that holds everything it needs, the plotting library included, and so opens anywhere."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from shoal.driver.jobs.display import format_s
from shoal.driver.jobs.report.figures import Chart, charts
from shoal.driver.jobs.report.look import PAGE, SCRIPT, STYLE
from shoal.driver.jobs.report.numbers import Run

_GOOD, _BAD = ("completed",), ("failed", "cancelled")
_MOST_EVENTS = 100


def make_page(report: dict[str, Any], runs: Sequence[Run]) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    drawn = charts(report, runs)
    # "</" would end the script element, wherever it stands.
    figures = json.dumps([chart.figure for chart in drawn], separators=(",", ":")).replace("</", "<\\/")
    name = html.escape(str(report["output"]).rstrip("/").rsplit("/", 1)[-1])
    return PAGE.format(
        name=name,
        style=STYLE,
        head=_head(report),
        cards="".join(_cards(report)),
        message=_message(report),
        charts="".join(_section(number, chart) for number, chart in enumerate(drawn)),
        tables="".join(_tables(report)),
        plotly=get_plotlyjs(),
        figures=figures,
        script=SCRIPT,
    )


def _head(report: dict[str, Any]) -> str:
    status = report["status"]
    kind = "good" if status in _GOOD else "bad" if status in _BAD else "open"
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report["time"]["began"]))
    inputs = ", ".join(report["input"][:3]) + (" …" if len(report["input"]) > 3 else "")
    devices = {f"{one['tensor_parallel_size']} {one['device']}, {one['dtype']}" for one in report["engines_resolved"]}
    facts = [str(report["model"]).rstrip("/").rsplit("/", 1)[-1], *sorted(devices), f"from {inputs}", f"begun {began}"]
    return (
        f'<span class="status {kind}">{html.escape(status.replace("_", " "))}</span>'
        f"<p>{' · '.join(html.escape(fact) for fact in facts)}</p>"
    )


def _cards(report: dict[str, Any]) -> Iterable[str]:
    """The headline."""
    rows, tokens, mean, times = report["request_counts"], report["tokens"], report["mean_rates"], report["time"]
    total = rows["total"] if rows["total"] is not None else rows["completed"] + rows["failed"]
    yield _card("Rows answered", f"{rows['completed']:,}", f"of {total:,} · {mean['rows_s']:,.1f} rows/s")
    errors = ", ".join(f"{number:,} {code}" for code, number in list(report["error_codes"].items())[:2])
    yield _card("Errors", f"{rows['failed']:,}", errors or "every row has its answer", bad=rows["failed"] > 0)
    yield _card("Generated", _short(tokens["generated"]), f"tokens · {mean['generated_tok_s']:,.0f} tok/s")
    cached = f"{tokens['cached'] / tokens['prompt']:.0%} from the prefix cache" if tokens["prompt"] else "none read"
    yield _card("Prompts", _short(tokens["prompt"]), f"tokens · {cached}")
    parts = f"{format_s(times['stages_s']['answer'])} answering, {format_s(times['stages_s']['start_engine'])} start-up"
    yield _card("Time", format_s(times["work_s"]), parts)
    waste = report["waste"]
    lost = "no token was made in vain"
    if waste["tokens"]:
        lost = f"{waste['tokens']:,} tokens made in vain, about {format_s(waste['equals_s'])} of work"
    if waste["without_engine_s"] >= 1:
        lost += f"; {format_s(waste['without_engine_s'])} without an engine"
    yield _card("Waste", f"{waste['share']:.1%}", lost)


def _card(name: str, value: str, note: str, bad: bool = False) -> str:
    mark = ' class="card bad"' if bad else ' class="card"'
    return f"<div{mark}><h3>{name}</h3><b>{html.escape(value)}</b><small>{html.escape(note)}</small></div>"


def _short(number: int) -> str:
    """At most four digits and a unit."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 10 * size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,}"


def _message(report: dict[str, Any]) -> str:
    return f'<p class="message">{html.escape(report["message"])}</p>' if report["message"] else ""


def _section(number: int, chart: Chart) -> str:
    wide = " wide" if chart.wide else ""
    return (
        f'<section class="chart{wide}"><h2>{html.escape(chart.title)}</h2><p>{html.escape(chart.note)}</p>'
        f'<div class="plot" id="plot-{number}"></div></section>'
    )


def _tables(report: dict[str, Any]) -> Iterable[str]:
    tokens, batch, stages = report["tokens"], report["batch"], report["time"]["stages_s"]
    everything = report["all_runs"]
    yield _table(
        "Accounts",
        [
            ("tokens generated", f"{tokens['generated']:,}"),
            ("… of them in answers", f"{tokens['committed']:,}"),
            ("… in vain", f"{tokens['wasted']:,}"),
            *([("… in rows not finished", f"{tokens['in_flight']:,}")] if tokens["in_flight"] else []),
            ("rows running, mean (of slots)", f"{batch['mean_running']:,.1f} ({batch['occupancy']:.0%})"),
            ("KV cache in use, mean (most)", f"{batch['mean_kv_cache_usage']:.0%} ({batch['max_kv_cache_usage']:.0%})"),
            ("preemptions", f"{everything['preemptions']:,}"),
            ("engine deaths", f"{everything['deaths']:,}"),
            ("rows put aside", f"{everything['quarantined']:,}"),
            ("runs of the command", f"{everything['runs']:,}"),
        ],
    )
    yield _table("Stages", [(name.replace("_", " "), _span(seconds)) for name, seconds in stages.items()])
    runs = [_run_row(number, run) for number, run in enumerate(report["runs"], 1)]
    yield _table("Runs", runs)
    events = [(_clock(event["time"]), f"{event['kind'].replace('_', ' ')}: {event['message']}") for event in
              report["events"][:_MOST_EVENTS]]  # fmt: skip
    yield _table("Events", events)
    settings = [(name, json.dumps(value)) for name, value in report["engine"].items()]
    job = {name: value for name, value in report["job"].items() if value not in (None, {}, False)}
    settings += [(name, json.dumps(value)) for name, value in job.items() if name not in ("input", "output")]
    yield _table("Configuration", settings, closed=True)
    engines = [(f"engine {i}: {name}", str(value)) for i, one in enumerate(report["engines_resolved"])
               for name, value in one.items()]  # fmt: skip
    yield _table("Engines", engines, closed=True)
    yield _table("Versions", [(name, str(value)) for name, value in report["versions"].items()], closed=True)


def _run_row(number: int, run: dict[str, Any]) -> tuple[str, str]:
    status = "killed, or still running" if run["killed"] else run["status"]
    deaths = f", {run['deaths']} engine deaths" if run["deaths"] else ""
    return f"{number} · {_clock(run['began'])}", f"{format_s(run['seconds'])} on {run['host']}: {status}{deaths}"


def _table(title: str, rows: Sequence[tuple[str, str]], closed: bool = False) -> str:
    if not rows:
        return ""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return (
        f"<details{'' if closed else ' open'}><summary>{title}</summary>"
        f'<div class="scroll"><table>{cells}</table></div></details>'
    )


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_s(seconds)


def _clock(when: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.gmtime(when))
