"""How often ranks are made anew, and how soon."""

from __future__ import annotations

LONGEST_WAIT_S = 30.0


class Restarts:
    """Restarts in a row. A request that finishes forgives them all."""

    def __init__(self, limit: int, backoff_s: float) -> None:
        self._limit, self._backoff_s = limit, backoff_s
        self.total = 0
        self.in_a_row = 0

    def next_wait(self) -> float | None:
        """Seconds to wait before one more try, which is counted; None when there have been enough."""
        if self.in_a_row == self._limit:
            return None
        self.in_a_row += 1
        self.total += 1
        return 0.0 if self.in_a_row == 1 else min(LONGEST_WAIT_S, self._backoff_s * 2.0 ** (self.in_a_row - 2))

    def refusal(self, what: str, reason: str) -> str:
        """Why there is no further try."""
        return (
            f"{what} died {self.in_a_row + 1} times with no request finished in between "
            f"(max_rank_restarts={self._limit}); the last time: {reason}"
        )

    def progress(self) -> None:
        """A request got its answer."""
        self.in_a_row = 0
