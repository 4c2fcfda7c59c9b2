"""The queue of requests that wait to run."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from shoal.driver.request import Request
from shoal.driver.suspects import Suspects


class WaitingQueue:
    """Requests in order of suspicion, priority and number. Those that ended meanwhile are skipped when met."""

    def __init__(self, use_priority: bool, suspects: Suspects) -> None:
        self._use_priority, self._suspects = use_priority, suspects
        self._heap: list[tuple[int, int, int, Request]] = []

    def push(self, request: Request) -> None:
        """It waits."""
        priority = request.source.priority if self._use_priority and not request.trust else 0
        heapq.heappush(self._heap, (-request.trust, priority, request.source.number, request))

    def head(self) -> Request | None:
        """The request that may be let in next."""
        while self._heap and self._heap[0][-1].finished:
            heapq.heappop(self._heap)
        head = self._heap[0][-1] if self._heap else None
        return head if head is not None and self._suspects.may_enter(head) else None

    def pop(self) -> None:
        """Take the head away."""
        heapq.heappop(self._heap)

    def sort_again(self, requests: Iterable[Request]) -> None:
        """These are the requests that wait, and what they are sorted by has changed."""
        self._heap.clear()
        for request in requests:
            self.push(request)
