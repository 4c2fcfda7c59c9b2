"""Which requests may share a step after the ranks died. No Ray, no clock: a policy that tests drive by hand.

A death takes the requests in its plans under suspicion. A machine may have failed, so they first get one more try among
themselves, a few at a time; what is there when the ranks die again then runs alone. A request that gets past the place
where the ranks died is free again. One with which alone they died `solo_deaths` times is guilty, and the others are
cleared. So a failed machine costs little, a request that kills is found in a fixed number of deaths, and an innocent
one never is.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.driver.request import Request, RequestStatus, Trust

GROUP = 32  # requests under suspicion that run together


class Suspects:
    """The requests under suspicion. For the scheduler's thread."""

    def __init__(self, solo_deaths: int = 3) -> None:
        self._solo_deaths = solo_deaths
        self._requests: dict[int, Request] = {}
        self._solo: Request | None = None

    @property
    def solo(self) -> Request | None:
        """The request that must run alone now."""
        return self._solo

    def enter(self, request: Request) -> None:
        """A request comes in; with solo deaths of an earlier life it is under suspicion from the start."""
        if request.num_solo_deaths:
            request.trust, request.trusted_from = Trust.ALONE, request.max_total_tokens
            self._requests[request.source.number] = request
            self._choose()

    def died(self, requests: Sequence[Request]) -> list[tuple[Request, bool]]:
        """The ranks died with these in their plans: each, and whether it was alone. Call before plans are forgotten."""
        alone = len(requests) == 1 and requests[0].trust is Trust.ALONE
        for request in requests:
            if alone:
                request.num_solo_deaths += 1
            else:
                request.num_company_deaths += 1
            again = request.trust is not Trust.FREE or request.num_solo_deaths > 0
            request.trust = Trust.ALONE if again else Trust.GROUP
            request.trusted_from = max(request.trusted_from, request.num_tokens + max(1, request.num_inflight_tokens))
            self._requests[request.source.number] = request
        self._choose()
        return [(request, alone) for request in requests]

    def try_alone(self, requests: Sequence[Request]) -> None:
        """Run each of them alone until it has its next token. Call before plans are forgotten."""
        for request in requests:
            if not request.finished:
                request.trust = Trust.ALONE
                request.trusted_from = max(
                    request.trusted_from, request.num_tokens + max(1, request.num_inflight_tokens)
                )
                self._requests[request.source.number] = request
        self._choose()

    def take_guilty(self) -> list[Request]:
        """Requests that have killed often enough; with them found, nothing is held against the others."""
        guilty = [request for request in self._requests.values() if request.num_solo_deaths >= self._solo_deaths]
        if guilty:
            for request in self._requests.values():
                request.trust = Trust.FREE
                if request not in guilty:
                    request.num_company_deaths = request.num_solo_deaths = 0
            self._requests.clear()
            self._choose()
        return guilty

    def grown(self, request: Request) -> None:
        """It has new tokens: past the place where the ranks died, it is free."""
        if request.finished or request.num_tokens >= request.trusted_from:
            request.trust = Trust.FREE
            request.num_company_deaths = 0
            self.forget(request)

    def forget(self, request: Request) -> None:
        """It has ended, or is free."""
        if self._requests.pop(request.source.number, None) is not None:
            self._choose()

    def may_enter(self, request: Request) -> bool:
        """Whether a waiting request may begin to run now."""
        if not self._requests:
            return True
        if self._solo is not None:
            return request is self._solo
        running = sum(one.status is RequestStatus.RUNNING for one in self._requests.values())
        return request.trust is Trust.GROUP and running < GROUP

    def _choose(self) -> None:
        """The first of those that must run alone: the same again after each of its deaths."""
        alone = [request for request in self._requests.values() if request.trust is Trust.ALONE]
        self._solo = min(alone, key=lambda request: request.source.number, default=None)
