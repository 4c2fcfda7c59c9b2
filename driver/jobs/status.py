"""What is known of a job while it runs: status.json, and a file of each run's history for the report."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from shoal.driver.bench.report import collect_versions
from shoal.driver.jobs.accounts import Accounts
from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.history import Samples
from shoal.driver.jobs.outcome import Status
from shoal.driver.jobs.state.ledger import Ledger
from shoal.driver.jobs.state.store import NO_ROOM, StateStore
from shoal.driver.log import LOGGER
from shoal.driver.secrecy import is_secret, masked

STATUS_FILE = "status.json"
SAMPLES_FILE = "samples-{epoch:06d}.json"
RUN_FILE = "run-{epoch:06d}.json"
_HISTORY_S = 5.0  # samples and events are larger, and nobody polls them


class StatusFile:
    """status.json in the state folder, and this run's samples and history. Only the owner of the ledger writes them:
    another gets SupersededError."""

    def __init__(
        self, store: StateStore, ledger: Ledger, config: JobConfig, accounts: Accounts, samples: Samples, every_s: float
    ) -> None:
        self._store, self._ledger, self._accounts, self._samples = store, ledger, accounts, samples
        self._epoch = ledger.epoch
        self._every_s = every_s
        self._written = self._history_written = 0.0
        self._times: dict[str, float] = {}
        self._message: str | None = None
        engine = config.engine.model_dump(exclude_defaults=True)
        self._about = {
            "model": config.engine.model,
            "input": config.input,
            "output": config.output,
            "fresh": config.fresh,
            "job": config.model_dump(mode="json", exclude={"engine"}),
            "engine": _plain({name: value for name, value in engine.items() if not is_secret(name)}),
            "versions": collect_versions(),
        }
        self.status = Status.VALIDATING

    def enter(self, status: Status, message: str | None = None) -> None:
        """A new state, written at once."""
        self.status, self._message = status, message
        self._times[status.value] = round(time.time(), 3)
        self.write()

    def refresh(self) -> None:
        """Writes what is old again."""
        now = time.monotonic()
        if now - self._written >= self._every_s:
            self._write_status()
        if now - self._history_written >= max(self._every_s, _HISTORY_S):
            self._write_history()

    def write(self) -> None:
        """Writes all of it."""
        self._write_history()
        self._write_status()

    def _write_status(self) -> None:
        self._written = time.monotonic()
        self._put(STATUS_FILE, json.dumps(self.as_dict(), indent=1))

    def _write_history(self) -> None:
        self._history_written = time.monotonic()
        self._put(SAMPLES_FILE.format(epoch=self._epoch), json.dumps(self._samples.points, separators=(",", ":")))
        self._put(RUN_FILE.format(epoch=self._epoch), masked(json.dumps(self._history())))

    def _put(self, name: str, text: str) -> None:
        self._ledger.check_owner()
        try:
            self._store.put(name, text.encode())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            LOGGER.error("%s cannot be written: %s", name, error)  # a later one tells more anyway

    def _history(self) -> dict[str, Any]:
        accounts, samples = self._accounts, self._samples
        return {
            "epoch": self._epoch,
            "status": self.status.value,
            "message": self._message,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "times": self._times,
            "written": round(time.time(), 3),
            "engines": list(samples.engines.values()),
            "deaths": accounts.engine_deaths,
            "boot_failures": accounts.boot_failures,
            "quarantined": accounts.quarantined,
            "events": samples.events,
            "num_events_dropped": samples.num_events_dropped,
            "prompt_lengths": sorted(accounts.prompt_lengths.items()),
            "output_lengths": sorted(accounts.output_lengths.items()),
            **self._about,
        }

    def as_dict(self) -> dict[str, Any]:
        """The content of status.json."""
        return {
            "status": self.status.value,
            "message": None if self._message is None else masked(self._message),
            "epoch": self._epoch,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "times": self._times,
            **self._accounts.as_dict(),
        }


def _plain(value: Any) -> Any:
    """As JSON has it; functions and classes by their names."""
    return json.loads(json.dumps(value, default=lambda one: getattr(one, "__qualname__", str(one))))
