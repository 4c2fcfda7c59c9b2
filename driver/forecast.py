"""How much KV the running requests will need at most, so that no request is let in only to be put back.

A request that cannot end before max_tokens (ignore_eos, no stop strings) has a known length. Of the others the lengths
of those that ended tell how much is still to come. The peak is exact for known lengths: at the step in which a request
ends, what is held is the tokens of all that last as long, and one token more of each for every step until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from shoal.driver.block_pool import KVCacheManager
from shoal.driver.request import Request

_LEAST_KNOWN = 16  # requests that ended, before their lengths say anything
_MOST_KNOWN = 1024  # the newest are kept


class OutputLengths:
    """Lengths of outputs that ended by themselves or at their limit."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_MOST_KNOWN)
        self._sorted = np.zeros(0)
        self._tails = np.zeros(0)  # sums of the sorted lengths from each place on

    def add(self, length: int) -> None:
        """One more ended."""
        self._lengths.append(length)
        self._sorted = np.zeros(0)

    def expected_left(self, generated: int) -> int:
        """Tokens still to come of an output that has so many: the mean of those that were longer; 0 if none was."""
        if len(self._lengths) < _LEAST_KNOWN:
            return 0
        if not len(self._sorted):
            self._sorted = np.sort(np.array(self._lengths, np.float64))
            self._tails = np.append(np.cumsum(self._sorted[::-1])[::-1], 0.0)
        place = int(np.searchsorted(self._sorted, generated, "right"))
        longer = len(self._sorted) - place
        return int(self._tails[place] / longer) - generated if longer else 0

    def left(self, request: Request) -> int:
        """Tokens that the request will still generate: exact where nothing can end it early."""
        most = request.max_total_tokens - request.num_tokens - request.num_inflight_tokens
        if is_fixed(request):
            return most
        return min(most, self.expected_left(request.num_output_tokens + request.num_inflight_tokens))


def is_fixed(request: Request) -> bool:
    """Whether only max_tokens ends it."""
    return not request.stop_set and not request.source.params.stop


class KVLoad:
    """What requests hold now and will hold, in tokens. Requests are added until one does not fit."""

    def __init__(self, capacity: int, block_size: int) -> None:
        self._capacity = capacity
        self._rounding = block_size // 2  # of a request's last block, on average
        self._held: list[float] = []
        self._left: list[int] = []
        self._most = 0.0  # if all lasted to their ends together

    def add(self, held: float, left: int) -> None:
        """A request that is in."""
        self._held.append(held + self._rounding)
        self._left.append(left)
        self._most += held + self._rounding + left

    def admits(self, held: float, left: int) -> bool:
        """Whether one more fits at every step from now on; if so, it is added."""
        if self._most + held + self._rounding + left > self._capacity:
            lefts = np.array([*self._left, left], np.float64)
            order = np.argsort(-lefts)
            holds = np.array([*self._held, held + self._rounding])[order]
            peak = (np.cumsum(holds) + np.arange(1, len(order) + 1) * lefts[order]).max()
            if peak > self._capacity:
                return False
        self.add(held, left)
        return True


class Admission:
    """Whether the first request in the queue would find room until its end."""

    def __init__(self) -> None:
        self.crowded = False  # it would not; nothing changes that until somebody leaves
        self._lengths = OutputLengths()
        self._load: KVLoad | None = None
        self._kv: KVCacheManager

    def look(self, kv: KVCacheManager) -> None:
        """A new step begins: what is held has changed."""
        self._kv, self._load = kv, None

    def lets_in(self, request: Request, num_cached: int, running: list[Request]) -> bool:
        """If so, it counts as one that is in for the rest of this step. An empty engine takes anything."""
        if self.crowded:
            return False
        load = self._load = self._load or self._load_of(running)
        self.crowded = not load.admits(request.num_tokens - num_cached, self._lengths.left(request)) and bool(running)
        return not self.crowded

    def ended(self, request: Request) -> None:
        """Takes note of how long it became."""
        if request.finish_reason in ("stop", "length") and not is_fixed(request):
            self._lengths.add(request.num_output_tokens)

    def _load_of(self, running: Iterable[Request]) -> KVLoad:
        """Blocks that several share count once."""
        pool, size = self._kv.pool, self._kv.block_size
        load = KVLoad(pool.num_blocks * size, size)
        shared = min(1.0, pool.num_used / max(1, sum(len(request.block_table) for request in running)))
        for request in running:
            tokens = request.num_tokens + request.num_inflight_tokens
            load.add(tokens * shared, 0 if request.finished else self._lengths.left(request))
        return load
