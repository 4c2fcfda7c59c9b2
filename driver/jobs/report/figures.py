"""The report's charts, made with Plotly. Colours are CSS variables, which the page fills in for light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shoal.driver.jobs.report.numbers import Run

_BINS = 240  # points of a curve: more than a screen shows is noise
_WINDOWS, _LEAST_WINDOW_S = 30, 2.0  # a rate is taken over this part of the whole time
_BARS = 36
_THIN = {"width": 1.5}
_UNITS = ((2 * 86400.0, "d", 86400.0), (2 * 3600.0, "h", 3600.0), (600.0, "min", 60.0), (0.0, "s", 1.0))
Value = Callable[[dict[str, float], dict[str, float], float], float | None]  # of two points and the seconds between


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its words."""

    title: str
    note: str
    figure: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of work as the charts' horizontal axis has them."""

    unit: str
    size: float

    @classmethod
    def fit(cls, seconds: float) -> Clock:
        """A unit that gives handy numbers."""
        unit, size = next((unit, size) for least, unit, size in _UNITS if seconds >= least)
        return cls(unit, size)


def charts(report: dict[str, Any], runs: Sequence[Run]) -> list[Chart]:
    """All of them; those that would be empty are left out."""
    clock = Clock.fit(report["time"]["work_s"])
    found = [
        _throughput(runs, clock),
        _batch(runs, clock),
        _cache(runs, clock),
        _tail(report, runs, clock),
        _prefix(report, runs, clock),
    ]
    found += [_lengths(report, "prompt", 2), _lengths(report, "output", 1)]
    found += [_counts(report["error_codes"], "Errors by code", "Rows that ended in an error.", "--bad")]
    found += [_counts(report["finish_reasons"], "How answers ended", "finish_reason of answered rows.", "--c3")]
    return [chart for chart in found if chart is not None]


def _curve(
    runs: Sequence[Run], clock: Clock, value: Value, smoothed: bool = False
) -> tuple[list[float], list[float | None]]:
    """A value over the whole job, thinned out; a gap between two runs stays a gap.

    `smoothed`: of each point and one some time before it, for engines tell of tokens in bursts.
    """
    total = sum(len(run.points) for run in runs)
    step = max(1, -(-total // _BINS))
    window = max(_LEAST_WINDOW_S, sum(run.seconds for run in runs) / _WINDOWS) if smoothed else 0.0
    x: list[float] = []
    y: list[float | None] = []
    for run in runs:
        earlier = 0
        kept = run.points[::step] + (run.points[-1:] if run.points and (len(run.points) - 1) % step else [])
        for last, two in pairwise(kept):
            while smoothed and run.points[earlier + 1]["time"] <= two["time"] - window:
                earlier += 1
            one = run.points[earlier] if smoothed else last
            span = two["time"] - one["time"]
            if span > 0:
                x.append(round(run.at(two["time"]) / clock.size, 4))
                y.append(_rounded(value(one, two, span)))
        if x and y[-1] is not None:
            x.append(x[-1])
            y.append(None)
    return x, y


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _rate(name: str) -> Value:
    return lambda one, two, span: max(0.0, (two[name] - one[name]) / span)


def _level(name: str, factor: float = 1.0) -> Value:
    return lambda one, two, span: two[name] * factor


def _line(name: str, xy: tuple[list[float], list[float | None]], colour: str, **more: Any) -> Any:
    import plotly.graph_objects as go

    x, y = xy
    line = {"color": f"var({colour})", "width": 2} | more.pop("line", {})
    return go.Scatter(x=x, y=y, name=name, mode="lines", line=line, **more)


def _filled(colour: str) -> dict[str, Any]:
    return {"fill": "tozeroy", "fillcolor": f"var({colour}-soft)"}


def _figure(traces: list[Any], clock: Clock | None, y_title: str, **layout: Any) -> dict[str, Any]:
    """A figure as plain JSON, in the page's look."""
    import plotly.graph_objects as go

    axis = {"gridcolor": "var(--grid)", "zeroline": False, "linecolor": "var(--grid)", "fixedrange": True}
    figure = go.Figure(traces)
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 14, "t": 8, "b": 40},
        height=280,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "inherit", "size": 12, "color": "var(--text-soft)"},
        hovermode="x unified" if clock is not None else "closest",
        hoverlabel={"bgcolor": "var(--card)", "bordercolor": "var(--grid)", "font": {"color": "var(--text)"}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        showlegend=len(traces) > 1,
        xaxis=axis | ({} if clock is None else {"ticksuffix": f" {clock.unit}", "rangemode": "tozero"}),
        yaxis=axis | {"title": {"text": y_title, "standoff": 6}, "rangemode": "tozero"},
    )
    figure.update_layout(**layout)
    plain: dict[str, Any] = figure.to_plotly_json()
    plain["layout"].pop("template", None)
    return {"data": [dict(one) for one in plain["data"]], "layout": plain["layout"]}


def _marks(runs: Sequence[Run], clock: Clock) -> list[dict[str, Any]]:
    """Vertical lines: where an engine died, and where another run of the command took the job up."""
    lines = [(run.start, "--text-soft", "dash") for run in runs[1:]]
    for run in runs:
        deaths = [event for event in run.about["events"] if event["kind"] in ("engine_death", "boot_failure")]
        lines += [(run.at(event["time"]), "--bad", "dot") for event in deaths]
    return [
        {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": at / clock.size,
            "x1": at / clock.size,
            "y0": 0,
            "y1": 1,
            "line": {"color": f"var({colour})", "width": 1.5, "dash": dash},
        }
        for at, colour, dash in lines
    ]


def _throughput(runs: Sequence[Run], clock: Clock) -> Chart:
    made = _line("generated", _curve(runs, clock, _rate("generated_tokens"), smoothed=True), "--c1", **_filled("--c1"))
    rate = _curve(runs, clock, _rate("prompt_tokens"), smoothed=True)
    read = _line("prompts (click)", rate, "--c2", line=_THIN, visible="legendonly")
    note = "Tokens a second; prompts count when their rows are answered. Dotted: an engine died. Dashed: a new run."
    return Chart("Throughput", note, _figure([made, read], clock, "tokens/s", shapes=_marks(runs, clock)), wide=True)


def _batch(runs: Sequence[Run], clock: Clock) -> Chart:
    running = _line("running", _curve(runs, clock, _level("running")), "--c1", **_filled("--c1"))
    waiting = _line("waiting in engines", _curve(runs, clock, _level("waiting")), "--c2", line=_THIN)
    slots = _line("slots", _curve(runs, clock, _level("slots")), "--text-soft", line={"width": 1, "dash": "dash"})
    figure = _figure([running, waiting, slots], clock, "rows", shapes=_marks(runs, clock))
    return Chart("Batch size", "Rows that run at once, of all engines, and the slots that engines have.", figure)


def _cache(runs: Sequence[Run], clock: Clock) -> Chart:
    used = _line("KV cache", _curve(runs, clock, _level("kv_cache_usage", 100)), "--c3", **_filled("--c3"))
    figure = _figure([used], clock, "% in use", shapes=_marks(runs, clock))
    figure["layout"]["yaxis"]["range"] = [0, 100]
    return Chart("KV cache", "Share of blocks in use, of the fullest engine.", figure)


def _tail(report: dict[str, Any], runs: Sequence[Run], clock: Clock) -> Chart | None:
    settled = report["request_counts"]["completed"] + report["request_counts"]["failed"]
    total = report["request_counts"]["total"] or settled
    if not total:
        return None
    done = _line("rows done", _curve(runs, clock, _level("settled", 100 / total)), "--c1", **_filled("--c1"))
    note, tail = "Rows with an answer or an error.", report["tail"]
    if tail is not None:
        note += f" The last {tail['rows_share']:.0%} of them took {tail['time_share']:.0%} of the time."
    figure = _figure([done], clock, "% of rows", shapes=_marks(runs, clock))
    figure["layout"]["yaxis"]["range"] = [0, 102]
    return Chart("Progress and tail", note, figure)


def _prefix(report: dict[str, Any], runs: Sequence[Run], clock: Clock) -> Chart | None:
    tokens = report["tokens"]
    if not tokens["cached"]:
        return None

    def share(one: dict[str, float], two: dict[str, float], span: float) -> float | None:
        read = two["prompt_tokens"] - one["prompt_tokens"]
        return 100 * (two["cached_tokens"] - one["cached_tokens"]) / read if read > 0 else None

    hits = _line("prefix hits", _curve(runs, clock, share, smoothed=True), "--c4", connectgaps=True)
    figure = _figure([hits], clock, "% of prompt tokens")
    figure["layout"]["yaxis"]["range"] = [0, 100]
    note = f"Prompt tokens found in the prefix cache, of rows as they finish: {tokens['cached'] / tokens['prompt']:.0%}"
    return Chart("Prefix cache", note + " in all.", figure)


def _lengths(report: dict[str, Any], name: str, colour: int) -> Chart | None:
    import plotly.graph_objects as go

    about = report["lengths"][name]
    if not about["rows"]:
        return None
    low, high = about["histogram"][0][0], about["histogram"][-1][0]
    width = max(1, -(-(high - low + 1) // _BARS))
    bars: dict[int, int] = {}
    for value, number in about["histogram"]:
        start = low + (value - low) // width * width
        bars[start] = bars.get(start, 0) + number
    trace = go.Bar(
        x=[start + width / 2 for start in bars],
        y=list(bars.values()),
        width=[width * 0.92] * len(bars),
        marker={"color": f"var(--c{colour})", "line": {"width": 0}},
        customdata=[f"{start} to {start + width - 1} tokens" if width > 1 else f"{start} tokens" for start in bars],
        hovertemplate="%{customdata}: %{y} rows<extra></extra>",
    )
    title = "Prompt lengths" if name == "prompt" else "Output lengths"
    note = f"Tokens: mean {about['mean']:,.0f}, median {about['p50']:,}, 99% up to {about['p99']:,}, longest "
    return Chart(title, note + f"{about['max']:,}.", _figure([trace], None, "rows"))


def _counts(counts: dict[str, int], title: str, note: str, colour: str) -> Chart | None:
    import plotly.graph_objects as go

    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: item[1])[-12:]
    trace = go.Bar(
        x=[number for _, number in ordered],
        y=[name for name, _ in ordered],
        text=[f"{number:,}" for _, number in ordered],
        orientation="h",
        marker={"color": f"var({colour})"},
        width=0.6,
        hovertemplate="%{y}: %{x} rows<extra></extra>",
    )
    figure = _figure([trace], None, "")
    figure["layout"]["height"] = 90 + 34 * len(ordered)
    figure["layout"]["yaxis"] |= {"automargin": True, "title": None}
    return Chart(title, note, figure)
