"""A job's counts: rows, tokens, errors, deaths, and the rates and the ETA that follow from them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_RATE_WINDOW_S = 60.0
_MOST_SAMPLES = 2000


@dataclass(slots=True)
class Usage:
    """Tokens of one answered row."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass(slots=True)
class Accounts:
    """Counts over the whole life of a job, earlier runs included, where nothing else is said."""

    total_rows: int | None = None  # known once the input was read to its end
    rows_read: int = 0  # by this run
    ok: int = 0
    errors: int = 0
    resumed: int = 0  # rows that earlier runs had settled, as far as this one has met them in the input
    unmet_ok: int = 0  # rows that earlier runs answered, and this one has not met yet
    unmet_errors: int = 0
    error_codes: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    committed_tokens: int = 0  # generated tokens of answered rows
    generated: dict[str, int] = field(default_factory=dict)  # tokens made, by engine
    engine_deaths: int = 0
    boot_failures: int = 0
    quarantined: int = 0
    started: float = field(default_factory=time.time)
    durable: tuple[int, int] = (0, 0)  # answers and errors that no crash can take back
    _recent: list[tuple[float, int, int, int]] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Rows with an answer or an error, those of earlier runs too that were not met yet: this never falls."""
        return self.settled + self.unmet_ok + self.unmet_errors

    @property
    def settled(self) -> int:
        """Rows with an answer or an error."""
        return self.ok + self.errors

    @property
    def generated_tokens(self) -> int:
        """All tokens that engines made."""
        return sum(self.generated.values())

    @property
    def wasted_tokens(self) -> int:
        """Tokens made that are in no answer."""
        return max(0, self.generated_tokens - self.committed_tokens)

    def answered(self, usage: Usage) -> None:
        """One more answer."""
        self.ok += 1
        self.prompt_tokens += usage.prompt
        self.cached_tokens += usage.cached
        self.committed_tokens += usage.completion

    def met(self, is_error: bool) -> None:
        """A row of the input that an earlier run has settled."""
        self.resumed += 1
        if is_error:
            self.failed("from an earlier run")
            self.unmet_errors = max(0, self.unmet_errors - 1)
        else:
            self.ok += 1
            self.unmet_ok = max(0, self.unmet_ok - 1)

    def mark_durable(self) -> None:
        """All that was counted is in the ledger for good."""
        self.durable = (self.ok + self.unmet_ok, self.errors + self.unmet_errors)

    def failed(self, code: str) -> None:
        """One more error."""
        self.errors += 1
        self.error_codes[code] += 1

    def mark(self) -> None:
        """Remembers where things stand now, for rates."""
        now = time.monotonic()
        self._recent.append((now, self.settled - self.resumed, self.prompt_tokens, self.committed_tokens))
        while len(self._recent) > 2 and now - self._recent[1][0] > _RATE_WINDOW_S:
            del self._recent[0]

    def rates(self) -> tuple[float, float, float]:
        """Rows, prompt tokens and generated tokens a second, over the last minute."""
        if len(self._recent) < 2:
            return 0.0, 0.0, 0.0
        first, last = self._recent[0], self._recent[-1]
        span = max(last[0] - first[0], 1e-9)
        return (last[1] - first[1]) / span, (last[2] - first[2]) / span, (last[3] - first[3]) / span

    def eta_s(self) -> float | None:
        """Seconds left: the tokens that remaining rows will take, at the rate tokens are made."""
        _, _, speed = self.rates()
        if self.total_rows is None or not self.ok or speed <= 0:
            return None
        left = max(0, self.total_rows - self.known)
        return left * (self.committed_tokens / self.ok) / speed

    def as_dict(self) -> dict[str, Any]:
        """For status.json and report.json."""
        rows, prompt, generated = self.rates()
        eta = self.eta_s()
        return {
            "request_counts": {"total": self.total_rows, "completed": self.durable[0], "failed": self.durable[1]},
            "rows": {"read": self.rows_read, "resumed": self.resumed, "quarantined": self.quarantined},
            "error_codes": dict(self.error_codes),
            "tokens": {
                "prompt": self.prompt_tokens,
                "cached": self.cached_tokens,
                "generated": self.generated_tokens,
                "committed": self.committed_tokens,
                "wasted": self.wasted_tokens,
            },
            "rates": {
                "rows_s": round(rows, 2),
                "prompt_tok_s": round(prompt, 1),
                "generated_tok_s": round(generated, 1),
            },
            "engines": {"deaths": self.engine_deaths, "boot_failures": self.boot_failures},
            "eta_s": None if eta is None else round(eta, 1),
        }


class Samples:
    """A time series of a bounded number of points: when there are too many, every other one goes."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self._every = 1.0
        self._last = 0.0

    def add(self, **values: float) -> None:
        """A point, unless the last one is too near."""
        now = time.time()
        if now - self._last < self._every:
            return
        self._last = now
        self.points.append({"time": round(now, 2), **values})
        if len(self.points) > _MOST_SAMPLES:
            self.points = self.points[::2]
            self._every *= 2
