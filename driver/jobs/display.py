"""Progress for people: two lines that stay in place on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

from shoal.driver.jobs.accounts import Accounts
from shoal.driver.log import LOGGER

_REDRAW_S = 0.5


class Load(Protocol):
    """How busy an engine is."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float


class Display:
    """Shows a job's counts. Rows, errors and totals are those of the whole job, rates those of the last minute."""

    def __init__(self, accounts: Accounts, every_s: float) -> None:
        """`every_s`: between two lines in a log."""
        self._accounts, self._every_s = accounts, every_s
        self._shown = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._lines: list[Any] = []
        self._kept = contextlib.ExitStack()

    def tick(self, engines: Iterable[Load], starting: bool) -> None:
        """Shows where things stand, if it is time to. `starting`: no engine was up yet."""
        now = time.monotonic()
        if now - self._shown < (_REDRAW_S if self._on_terminal else self._every_s):
            return
        self._shown = now
        parts = progress(self._accounts, list(engines), starting)
        if self._on_terminal:
            self._draw(parts)
        else:
            LOGGER.info("%s", " | ".join(parts))

    def _draw(self, parts: list[str]) -> None:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        accounts = self._accounts
        if not self._lines:
            self._kept.enter_context(logging_redirect_tqdm([LOGGER]))
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} rows, {elapsed}{postfix}"
            self._lines = [
                tqdm(total=accounts.total_rows, bar_format=form, dynamic_ncols=True, position=0),
                tqdm(total=0, bar_format="{desc}", dynamic_ncols=True, position=1, leave=False),
            ]
        bar, text = self._lines
        bar.total, bar.n = accounts.total_rows, accounts.settled
        left = [part for part in parts if part.endswith(" left")]
        bar.set_postfix_str(", ".join(left), refresh=True)
        text.set_description_str("  " + " | ".join(part for part in parts[1:] if part not in left), refresh=True)

    def close(self) -> None:
        """Ends the lines where they stand."""
        if self._lines:
            bar, text = self._lines
            text.close()
            bar.n = self._accounts.settled
            bar.set_postfix_str("", refresh=True)
            bar.close()
            self._lines = []
            self._kept.close()


def progress(accounts: Accounts, engines: list[Load], starting: bool) -> list[str]:
    """Where a job stands: rows, tokens, engines, errors, time left."""
    rows, prompt, generated = accounts.rates()
    total = "" if accounts.total_rows is None else f" of {accounts.total_rows:,}"
    share = f" ({accounts.settled / accounts.total_rows:.1%})" if accounts.total_rows else ""
    if starting:
        return [f"{accounts.settled:,}{total} rows{share}", "starting engines", f"errors {accounts.errors:,}"]
    parts = [f"{accounts.settled:,}{total} rows{share}, {rows:,.1f} rows/s"]
    parts.append(f"in {prompt:,.0f} tok/s, out {generated:,.0f} tok/s")
    kv = max((one.kv_cache_usage for one in engines), default=0.0)
    running, waiting = sum(one.num_running for one in engines), sum(one.num_waiting for one in engines)
    parts.append(f"running {running:,}, waiting {waiting:,}, KV {kv:.0%}")
    parts.append(f"errors {accounts.errors:,}")
    if accounts.engine_deaths:
        parts.append(f"engine deaths {accounts.engine_deaths}")
    eta = accounts.eta_s()
    if eta is not None:
        parts.append(f"{format_s(eta)} left")
    return parts


def format_s(seconds: float) -> str:
    """A span of time, in the two largest units."""
    whole = round(seconds)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part_size}{part}"
    return f"{whole}s"
