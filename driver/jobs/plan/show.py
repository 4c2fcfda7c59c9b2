"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shoal.driver.jobs.display import format_s

_SHOWN = 20
_BARS, _WIDTH = 12, 40
_GIB = 1 << 30


def show(plan: dict[str, Any]) -> str:
    """The whole text."""
    return "\n".join(_lines(plan))


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    rows, prompt, output, fit = plan["rows"], plan["prompt"], plan["output"], plan["kv_cache"]
    yield f"{', '.join(plan['input'])} with {plan['model']} ({plan['dtype']})"
    more = "" if rows["complete"] else " and more, which were not read (validate_rows)"
    yield _line("rows", f"{rows['read']:,}{more}; {rows['tokenized']:,} of them tokenized")
    yield _line("to answer", f"{rows['usable']:,}")
    codes = ", ".join(f"{count:,} {code}" for code, count in sorted(rows["refused_by_code"].items()))
    yield _line("refused", f"{rows['refused']:,}" + (f" ({codes})" if codes else ""))
    for text in rows["refused_rows"][:_SHOWN]:
        yield f"    {text}"
    if rows["refused"] > _SHOWN:
        yield f"    and {rows['refused'] - _SHOWN:,} more"
    if rows["stops_the_job"]:
        yield "    run-batch would end here with code 3, unless on_invalid is continue"
    yield _line("duplicates", f"{rows['duplicates']:,} rows ask for what an earlier row asks for")
    if not prompt["rows"]:
        return
    yield _line(
        "prompt tokens", f"{prompt['tokens']:,}; a row: mean {prompt['mean']:,}, median {prompt['p50']:,}, "
        f"99% up to {prompt['p99']:,}, longest {fit['longest_prompt']:,}"
    )  # fmt: skip
    yield from _histogram(prompt["histogram"])
    yield _line("shared beginnings", f"{prompt['shared_prefix_share']:.1%} of prompt tokens: computed once")
    yield _line("output tokens", f"{output['tokens']:,} ({output['rests_on']}); a row: mean {output['mean']:,}")
    yield _line(
        "KV cache", f"{fit['kv_tokens']:,} tokens = {fit['kv_tokens'] * fit['kv_bytes_per_token'] / _GIB:,.1f} GiB on "
        f"{fit['device']} ({fit['rests_on']})"
    )  # fmt: skip
    yield _line(
        "", f"a row takes {fit['tokens_a_row']:,} on average, {fit['longest_row']:,} at most; about "
        f"{fit['rows_at_once']:,} of {fit['max_num_seqs']:,} slots can be full at once"
    )  # fmt: skip
    if fit["rows_that_never_fit"]:
        yield _line("", f"{fit['rows_that_never_fit']:,} rows do not fit even alone, and will be refused")
    for one in plan["estimates"]:
        seconds = one["seconds"]
        span = format_s(seconds) if seconds >= 10 else f"{seconds:.2f} s"
        yield _line("time", f"{span}, by the {one['rests_on']}")
    if not plan["estimates"]:
        yield _line("time", "unknown: name a card (--card H100) or an earlier job (--like OUT)")


def _line(name: str, text: str) -> str:
    return f"{name:<18} {text}"


def _histogram(histogram: list[list[int]]) -> Iterator[str]:
    low, high = histogram[0][0], histogram[-1][0]
    width = max(1, -(-(high - low + 1) // _BARS))
    bars: dict[int, int] = {}
    for value, count in histogram:
        start = low + (value - low) // width * width
        bars[start] = bars.get(start, 0) + count
    most = max(bars.values())
    for start in range(low, high + 1, width):
        count = bars.get(start, 0)
        label = f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}"
        yield f"{label:>18} {'#' * -(-count * _WIDTH // most):<{_WIDTH}} {count:,}"
