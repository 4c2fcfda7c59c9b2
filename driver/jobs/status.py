"""What a person sees while a job runs: status.json, a bar on a terminal, lines in a log."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import Any

from shoal.driver.jobs.accounts import Accounts, Samples
from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.outcome import Status
from shoal.driver.jobs.state.ledger import Ledger
from shoal.driver.jobs.state.store import NO_ROOM, StateStore
from shoal.driver.log import LOGGER
from shoal.driver.secrecy import masked

STATUS_FILE = "status.json"
SAMPLES_FILE = "samples-{epoch:06d}.json"


class StatusFile:
    """status.json in the state folder. Only the owner of the ledger writes it: another gets SupersededError."""

    def __init__(self, store: StateStore, ledger: Ledger, accounts: Accounts, samples: Samples, every_s: float) -> None:
        self._store, self._ledger, self._accounts, self._samples = store, ledger, accounts, samples
        self._every_s = every_s
        self._written = 0.0
        self._times: dict[str, float] = {}
        self._message: str | None = None
        self.status = Status.VALIDATING

    def enter(self, status: Status, message: str | None = None) -> None:
        """A new state, written at once."""
        self.status, self._message = status, message
        self._times[status.value] = round(time.time(), 3)
        self.write()

    def refresh(self) -> None:
        """Writes it again if it is old."""
        if time.monotonic() - self._written >= self._every_s:
            self.write()

    def write(self) -> None:
        """Writes it."""
        self._ledger.check_owner()
        self._written = time.monotonic()
        points = json.dumps(self._samples.points, separators=(",", ":")).encode()
        try:
            self._store.put(STATUS_FILE, json.dumps(self.as_dict(), indent=1).encode())
            self._store.put(SAMPLES_FILE.format(epoch=self._ledger.epoch), points)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            LOGGER.error("the status cannot be written: %s", error)  # a later one tells more anyway

    def as_dict(self) -> dict[str, Any]:
        """Its content."""
        return {
            "status": self.status.value,
            "message": None if self._message is None else masked(self._message),
            "epoch": self._ledger.epoch,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "times": self._times,
            **self._accounts.as_dict(),
        }


class Display:
    """Progress for people."""

    def __init__(self, config: JobConfig, accounts: Accounts) -> None:
        self._accounts, self._every_s = accounts, config.progress_s
        self._shown = time.monotonic()
        self._bar: Any = None
        self._on_terminal = sys.stderr.isatty()

    def tick(self, running: int, waiting: int, kv_cache_usage: float) -> None:
        """Shows where things stand, if it is time to."""
        now = time.monotonic()
        if now - self._shown < (0.5 if self._on_terminal else self._every_s):
            return
        self._shown = now
        accounts = self._accounts
        _, prompt, generated = accounts.rates()
        load = f"in {prompt:,.0f} tok/s, out {generated:,.0f} tok/s, running {running}, waiting {waiting}"
        load += f", KV {kv_cache_usage:.0%}, errors {accounts.errors}"
        eta = accounts.eta_s()
        if self._on_terminal:
            self._draw(load, eta)
        else:
            total = "" if accounts.total_rows is None else f" of {accounts.total_rows}"
            left = "" if eta is None else f", {format_s(eta)} left"
            LOGGER.info("%d%s rows, %.1f rows/s, %s%s", accounts.known, total, accounts.rates()[0], load, left)

    def _draw(self, load: str, eta: float | None) -> None:
        from tqdm import tqdm

        if self._bar is None:
            form = "{n_fmt}/{total_fmt} rows [{elapsed}{postfix}]"
            self._bar = tqdm(total=self._accounts.total_rows, bar_format="{l_bar}{bar}| " + form, dynamic_ncols=True)
        self._bar.total = self._accounts.total_rows
        self._bar.n = self._accounts.known
        self._bar.set_postfix_str(load + ("" if eta is None else f", {format_s(eta)} left"), refresh=True)

    def close(self) -> None:
        """Ends the bar where it stands."""
        if self._bar is not None:
            self._bar.n = self._accounts.known
            self._bar.refresh()
            self._bar.close()
            self._bar = None


def format_s(seconds: float) -> str:
    """A span of time, in the two largest units."""
    whole = round(seconds)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part_size}{part}"
    return f"{whole}s"
