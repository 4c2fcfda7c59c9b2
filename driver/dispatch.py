"""Which rows go to which engine. No Ray, no clock: a policy that tests drive by hand.

An engine that dies takes the rows in it under suspicion. A machine may have failed, so they get one more try among
themselves, a few at a time; whatever is in an engine that dies then runs alone. A row with which alone an engine died
`solo_deaths` times is put aside; the others that were under suspicion with it are cleared. So a failed machine costs
little, a row that kills is found in a fixed number of deaths, and an innocent row is never put aside.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

from shoal.driver.jobs.work import Work

GROUP = 32  # sequences under suspicion that run together


class Trust(IntEnum):
    """In what company a row may run."""

    FREE = 0
    GROUP = 1
    ALONE = 2


def trust(work: Work) -> Trust:
    """What a row's tries mean."""
    if work.tries.alone or work.tries.in_company > 1:
        return Trust.ALONE
    return Trust.GROUP if work.tries.in_company else Trust.FREE


@dataclass(slots=True)
class Lane:
    """What one engine has."""

    slots: int  # sequences that run at once
    mode: Trust = Trust.FREE
    works: dict[int, Work] = field(default_factory=dict)  # by the row's index, in the order they were given
    num_sequences: int = 0

    @property
    def window(self) -> int:
        """Sequences it may hold: the queue in the engine must not run dry between two deliveries."""
        return {Trust.FREE: 2 * self.slots, Trust.GROUP: GROUP, Trust.ALONE: 1}[self.mode]


@dataclass(slots=True)
class Verdict:
    """What a death means for the rows that were there."""

    tried: list[tuple[Work, bool]] = field(default_factory=list)  # and whether it was alone
    guilty: Work | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Rows that change lanes. They are to be ended in the one engine and begun in the other."""

    source: int
    target: int
    works: list[Work]


class Dispatcher:
    """Rows waiting, and rows in lanes."""

    def __init__(self, solo_deaths: int) -> None:
        self._solo_deaths = solo_deaths
        self._waiting: dict[Trust, deque[Work]] = {kind: deque() for kind in Trust}
        self.lanes: dict[int, Lane] = {}

    @property
    def num_fresh(self) -> int:
        """Rows that wait and are under no suspicion."""
        return len(self._waiting[Trust.FREE])

    @property
    def num_waiting(self) -> int:
        """Rows in no lane."""
        return sum(map(len, self._waiting.values()))

    @property
    def num_open(self) -> int:
        """Rows in lanes."""
        return sum(len(lane.works) for lane in self.lanes.values())

    def add(self, work: Work) -> None:
        """A row to be answered."""
        self._waiting[trust(work)].append(work)

    def open_lane(self, number: int, slots: int) -> None:
        """An engine is up."""
        self.lanes[number] = Lane(slots)

    def take(self, number: int) -> list[Work]:
        """Rows that the engine is to get now; none while a delivery would be too small to be worth it."""
        lane = self.lanes[number]
        if not lane.works:
            lane.mode = self._next_mode(number)
        waiting = self._waiting[lane.mode]
        room = lane.window - lane.num_sequences
        if lane.works and (lane.mode == Trust.ALONE or room < max(1, lane.window // 8)):
            return []
        taken: list[Work] = []
        while waiting and (room >= waiting[0].size or not lane.works):
            work = waiting.popleft()
            lane.works[work.index] = work
            lane.num_sequences += work.size
            room -= work.size
            taken.append(work)
            if lane.mode == Trust.ALONE:
                break
        return taken

    def _next_mode(self, number: int) -> Trust:
        """Suspects first, unless another lane already has some and there is other work to do."""
        others = any(lane.mode != Trust.FREE and lane.works for n, lane in self.lanes.items() if n != number)
        if others and self._waiting[Trust.FREE]:
            return Trust.FREE
        return next((kind for kind in (Trust.GROUP, Trust.ALONE) if self._waiting[kind]), Trust.FREE)

    def done(self, number: int, work: Work) -> None:
        """A row of the lane has all its results."""
        lane = self.lanes[number]
        del lane.works[work.index]
        lane.num_sequences -= work.size

    def died(self, number: int) -> Verdict:
        """The lane's engine died: what each of its rows is to be remembered by, and the one that is put aside."""
        lane = self.lanes.pop(number)
        verdict = Verdict()
        for work in lane.works.values():
            work.results.clear()
            alone = lane.mode == Trust.ALONE
            if alone:
                work.tries.alone += 1
            else:
                work.tries.in_company += 1
            verdict.tried.append((work, alone))
            if work.tries.alone >= self._solo_deaths:
                verdict.guilty = work
            else:
                self._waiting[trust(work)].append(work)
        if lane.mode == Trust.ALONE and verdict.guilty is None:
            self._waiting[Trust.ALONE].rotate(1)  # the same row again: its other tries come at once
        if verdict.guilty is not None:
            self._clear_others()
        return verdict

    def _clear_others(self) -> None:
        for kind in (Trust.GROUP, Trust.ALONE):
            for work in self._waiting[kind]:
                work.tries.in_company = work.tries.alone = 0
            self._waiting[Trust.FREE].extendleft(reversed(self._waiting[kind]))
            self._waiting[kind].clear()

    def rebalance(self) -> Move | None:
        """When nothing waits and a lane has free slots: moves rows there that cannot be running yet where they are."""
        free_lanes = {n: lane for n, lane in self.lanes.items() if lane.mode == Trust.FREE or not lane.works}
        if self.num_waiting or len(free_lanes) < 2:
            return None
        spare = {n: lane.slots - lane.num_sequences for n, lane in free_lanes.items()}
        source, target = min(spare, key=spare.__getitem__), max(spare, key=spare.__getitem__)
        room = min(-spare[source], spare[target])
        moved: list[Work] = []
        for work in reversed(self.lanes[source].works.values()):
            if work.size > room or work.results:
                break
            moved.append(work)
            room -= work.size
        if not moved:
            return None
        self.lanes[target].mode = Trust.FREE
        for work in reversed(moved):
            self.done(source, work)
            self.lanes[target].works[work.index] = work
            self.lanes[target].num_sequences += work.size
        return Move(source, target, moved[::-1])
