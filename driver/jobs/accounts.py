"""A job's counts: rows, tokens, errors, deaths, and the rates and the ETA that follow from them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from shoal.driver.jobs.keys import Int64

_RATE_WINDOW_S = 60.0
_MARK_S = 0.2
_FINE_BITS = 6


@dataclass(slots=True)
class Usage:
    """Tokens of one answered row."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@lru_cache(maxsize=1 << 16)
def bucket(tokens: int) -> int:
    """The lower end of a length's bucket: exact below 64, then 32 buckets between a power of two and the next."""
    shift = max(0, tokens.bit_length() - _FINE_BITS)
    return tokens >> shift << shift


@dataclass(slots=True)
class Answered:
    """Counts of many answered rows. Tokens are sums; lengths are by bucket."""

    rows: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    output_lengths: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, usages: Sequence[Sequence[int]], reasons: Iterable[str | None]) -> Answered:
        """Of rows; each usage is prompt, completion and cached tokens."""
        if not usages:
            return cls()
        columns = np.array(usages, np.int64).T
        prompt, completion, cached = columns.sum(axis=1).tolist()
        lengths = [_count(column) for column in columns[:2]]
        return cls(len(usages), prompt, completion, cached, Counter(one or "unknown" for one in reasons), *lengths)

    def add(self, other: Answered) -> None:
        """Counts of further rows."""
        for name in ("rows", "prompt", "completion", "cached"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("reasons", "prompt_lengths", "output_lengths"):
            getattr(self, name).update(getattr(other, name))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Answered:
        """Of what `as_dict` made, after its way through JSON, whose keys are text."""
        lengths = {
            name: Counter({int(length): count for length, count in plain[name].items()})
            for name in ("prompt_lengths", "output_lengths")
        }
        return cls(**plain | lengths | {"reasons": Counter(plain["reasons"])})


def _count(lengths: Int64) -> Counter[int]:
    counts: Counter[int] = Counter()
    found, times = np.unique(lengths, return_counts=True)
    for length, count in zip(found.tolist(), times.tolist(), strict=True):
        counts[bucket(length)] += count
    return counts


@dataclass(slots=True)
class Accounts:
    """Counts over the whole life of a job, earlier runs included, where nothing else is said."""

    total_rows: int | None = None  # known once the input was read to its end
    rows_read: int = 0  # by this run
    ok: int = 0
    errors: int = 0
    resumed: int = 0  # rows that earlier runs had settled, as far as this run met them in the input
    unmet_ok: int = 0  # rows that earlier runs answered, counted in `ok`, and not met in the input yet
    unmet_errors: dict[int, str] = field(default_factory=dict)  # the same of `errors`: code, by the record's location
    error_codes: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    prompt_lengths: Counter[int] = field(default_factory=Counter)  # of answered rows, by bucket
    output_lengths: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    committed_tokens: int = 0  # generated tokens of answered rows
    generated: dict[str, int] = field(default_factory=dict)  # tokens made, by engine
    in_flight_tokens: int = 0  # of those, tokens of rows that are in an engine now
    begun_rows: int = 0  # rows that this run gave to engines or will
    begun_limit: int = 0  # tokens that they may take at most
    engine_deaths: int = 0  # in this run, as the next two
    boot_failures: int = 0
    quarantined: int = 0
    started: float = field(default_factory=time.time)
    durable: tuple[int, int] = (0, 0)  # answers and errors that no crash can take back
    _recent: list[tuple[float, int, int, int]] = field(default_factory=list)

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
        """Tokens made that are in no answer, and will be in none."""
        return max(0, self.generated_tokens - self.committed_tokens - self.in_flight_tokens)

    def answered(self, usage: Usage, finish_reason: str | None) -> None:
        """One more answer."""
        self.ok += 1
        self.prompt_tokens += usage.prompt
        self.cached_tokens += usage.cached
        self.committed_tokens += usage.completion
        self.finish_reasons[finish_reason or "unknown"] += 1
        self.prompt_lengths[bucket(usage.prompt)] += 1
        self.output_lengths[bucket(usage.completion)] += 1

    def answered_before(self, before: Answered) -> None:
        """Answers of earlier runs, many at once."""
        self.ok += before.rows
        self.prompt_tokens += before.prompt
        self.cached_tokens += before.cached
        self.committed_tokens += before.completion
        self.finish_reasons.update(before.reasons)
        self.prompt_lengths.update(before.prompt_lengths)
        self.output_lengths.update(before.output_lengths)

    def mark_durable(self) -> None:
        """All that was counted is in the ledger for good."""
        self.durable = (self.ok, self.errors)

    def failed(self, code: str) -> None:
        """One more error."""
        self.errors += 1
        self.error_codes[code] += 1

    def found(self, num_ok: int, errors: dict[int, str]) -> None:
        """What earlier runs settled: counted at once, so that a resumed job goes on where it stood.

        `errors`: code of each row in error, by the location of its record.
        """
        self.ok, self.unmet_ok = num_ok, num_ok
        self.errors, self.unmet_errors = len(errors), errors
        self.error_codes = Counter(errors.values())

    def met(self, location: int, is_error: bool) -> None:
        """A row of the input turned out to be settled already."""
        self.resumed += 1
        if is_error:
            if self.unmet_errors.pop(location, None) is None:
                self.failed("from an earlier run")
        elif self.unmet_ok:
            self.unmet_ok -= 1
        else:
            self.ok += 1

    def met_many(self, values: Int64) -> None:
        """The same of many rows; a value is location << 1 | is error."""
        is_error = values & 1 == 1
        for value in values[is_error].tolist():
            self.met(value, is_error=True)
        answers = len(values) - int(is_error.sum())
        expected = min(answers, self.unmet_ok)
        self.resumed += answers
        self.unmet_ok -= expected
        self.ok += answers - expected

    def forget_unmet(self) -> None:
        """The input was read to its end: what was not met there belongs to rows that are gone or were changed."""
        self.ok -= self.unmet_ok
        self.errors -= len(self.unmet_errors)
        self.error_codes -= Counter(self.unmet_errors.values())
        self.unmet_ok = 0
        self.unmet_errors = {}

    def mark(self) -> None:
        """Remembers where things stand now, for rates."""
        now = time.monotonic()
        if len(self._recent) > 1 and now - self._recent[-2][0] < _MARK_S:
            self._recent.pop()  # a loop that turns hundreds of times a second needs no mark of each turn
        self._recent.append((now, self.settled, self.prompt_tokens, self.generated_tokens))
        while len(self._recent) > 2 and now - self._recent[1][0] > _RATE_WINDOW_S:
            del self._recent[0]

    def rates(self) -> tuple[float, float, float]:
        """Rows, prompt tokens of answered rows and generated tokens a second, over the last minute."""
        if len(self._recent) < 2:
            return 0.0, 0.0, 0.0
        first, last = self._recent[0], self._recent[-1]
        span = max(last[0] - first[0], 1e-9)
        return (last[1] - first[1]) / span, (last[2] - first[2]) / span, (last[3] - first[3]) / span

    def eta_s(self) -> float | None:
        """Seconds left: the tokens that remaining rows will take, less those they have, at the rate of making them.

        A row's tokens are estimated from finished rows and from what unfinished ones have made: short rows finish
        first, and their mean alone would promise too much. No row is taken to need more than it may.
        """
        _, _, speed = self.rates()
        if self.total_rows is None or not self.ok or speed <= 0:
            return None
        tokens_a_row = (self.committed_tokens + self.in_flight_tokens) / self.ok
        if self.begun_rows:
            tokens_a_row = min(tokens_a_row, self.begun_limit / self.begun_rows)
        left = max(0, self.total_rows - self.settled)
        return max(0.0, left * tokens_a_row - self.in_flight_tokens) / speed

    def as_dict(self) -> dict[str, Any]:
        """For status.json and report.json."""
        rows, prompt, generated = self.rates()
        eta = self.eta_s()
        return {
            "request_counts": {"total": self.total_rows, "completed": self.durable[0], "failed": self.durable[1]},
            "rows": {"read": self.rows_read, "resumed": self.resumed, "quarantined": self.quarantined},
            "error_codes": dict(self.error_codes),
            "finish_reasons": dict(self.finish_reasons),
            "tokens": {
                "prompt": self.prompt_tokens,
                "cached": self.cached_tokens,
                "generated": self.generated_tokens,
                "committed": self.committed_tokens,
                "in_flight": self.in_flight_tokens,
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
