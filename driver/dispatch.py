"""Which rows go to which engine, and what a death means for them. No Ray, no clock: tests drive it by hand.

An engine that dies takes the rows in it under suspicion. A machine may have failed, so they get one more try among
themselves, a few at a time; whatever is in an engine that dies then runs alone. A row with which alone an engine died
`solo_deaths` times is put aside; the others that were under suspicion with it are cleared. So a failed machine costs
little, a row that kills is found in a fixed number of deaths, and an innocent row is never put aside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from shoal.driver.routing import Routable, Router

if TYPE_CHECKING:
    from shoal.driver.params import SamplingParams
    from shoal.driver.request import EngineRequest, FinishedRequest

GROUP = 32  # sequences under suspicion that run together


@dataclass(slots=True)
class Tries:
    """How often an engine died with a row in it. Deaths of ranks that the engine outlived are counted apart: it keeps
    rows that may have killed them from the others by itself."""

    in_company: int = 0
    alone: int = 0
    ranks_in_company: int = 0
    ranks_alone: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.in_company + self.alone + self.ranks_in_company + self.ranks_alone

    def story(self, last: str) -> str:
        """Why a row was put aside, for people."""
        return (
            f"the engine died {self.alone} times with this row alone in it, and {self.in_company} times with others; "
            f"the last time: {last}"
        )

    def add(self, alone: bool, of_ranks: bool) -> None:
        """One more."""
        if of_ranks:
            self.ranks_alone += alone
            self.ranks_in_company += not alone
        else:
            self.alone += alone
            self.in_company += not alone


class Item(Routable, Protocol):
    """A row to dispatch."""

    @property
    def tries(self) -> Tries: ...
    @property
    def results(self) -> dict[int, FinishedRequest]: ...


@dataclass(slots=True, eq=False)
class Dispatched:
    """One request on its way."""

    request: EngineRequest
    tries: Tries = field(default_factory=Tries)
    results: dict[int, FinishedRequest] = field(default_factory=dict)
    lane: int = -1  # the engine it is in

    @property
    def index(self) -> int:
        """The client's number."""
        return self.request.number

    @property
    def size(self) -> int:
        """It is one sequence."""
        return 1

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt."""
        return self.request.prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        """How it is sampled."""
        return self.request.params

    @property
    def cache_salt(self) -> str | None:
        """What keeps its prefixes apart from others'."""
        return self.request.cache_salt

    @property
    def priority(self) -> int:
        """Lower goes first."""
        return self.request.priority


ItemT = TypeVar("ItemT", bound=Item)


class Trust(IntEnum):
    """In what company a row may run."""

    FREE = 0
    GROUP = 1
    ALONE = 2


def trust(item: Item) -> Trust:
    """What a row's tries mean."""
    if item.tries.alone or item.tries.in_company > 1:
        return Trust.ALONE
    return Trust.GROUP if item.tries.in_company else Trust.FREE


@dataclass(slots=True)
class Lane(Generic[ItemT]):
    """What one engine has."""

    slots: int  # sequences that run at once
    mode: Trust = Trust.FREE
    works: dict[int, ItemT] = field(default_factory=dict)  # by the row's index, in the order they were given
    num_sequences: int = 0
    queued: int = 0  # sequences that wait in the engine, as it last said

    @property
    def window(self) -> int:
        """Sequences it may hold: the queue in the engine must not run dry between two deliveries."""
        return {Trust.FREE: 2 * self.slots, Trust.GROUP: GROUP, Trust.ALONE: 1}[self.mode]

    @property
    def excess(self) -> int:
        """Sequences it holds and cannot be running yet: no place, no room in its cache, or other prompts first."""
        return max(self.num_sequences - self.slots, min(self.queued, self.num_sequences))

    @property
    def open(self) -> bool:
        """Whether it takes rows under no suspicion."""
        return self.mode == Trust.FREE or not self.works


@dataclass(slots=True)
class Verdict(Generic[ItemT]):
    """What a death means for the rows that were there."""

    tried: list[tuple[ItemT, bool]] = field(default_factory=list)  # and whether it was alone
    guilty: ItemT | None = None


@dataclass(frozen=True, slots=True)
class Move(Generic[ItemT]):
    """Rows that change lanes. They are to be ended in the one engine and begun in the other."""

    source: int
    target: int
    works: list[ItemT]


class Dispatcher(Generic[ItemT]):
    """Rows waiting, and rows in lanes."""

    def __init__(self, solo_deaths: int, block_size: int = 16, by_prefix: bool = False) -> None:
        """`by_prefix`: rows that begin alike go to the same lane, where its cache has that; see Router."""
        self._solo_deaths = solo_deaths
        self._suspects: dict[Trust, deque[ItemT]] = {Trust.GROUP: deque(), Trust.ALONE: deque()}
        self.router: Router[ItemT] = Router(block_size, by_prefix)
        self.lanes: dict[int, Lane[ItemT]] = {}

    @property
    def num_fresh(self) -> int:
        """Rows that wait and are under no suspicion."""
        return self.router.num_waiting

    @property
    def num_waiting(self) -> int:
        """Rows in no lane."""
        return self.num_fresh + sum(map(len, self._suspects.values()))

    @property
    def num_open(self) -> int:
        """Rows in lanes."""
        return sum(len(lane.works) for lane in self.lanes.values())

    def add(self, work: ItemT) -> None:
        """A row to be answered."""
        kind = trust(work)
        if kind == Trust.FREE:
            self.router.add(work)
        else:
            self._suspects[kind].append(work)

    def withdraw(self, index: int) -> ItemT | None:
        """Takes back a row that is in no lane; None if there is none."""
        for waiting in self._suspects.values():
            for work in waiting:
                if work.index == index:
                    waiting.remove(work)
                    return work
        return self.router.remove(index)

    def clear(self) -> None:
        """Forgets all rows; the lanes stay."""
        self.router.forget_items()
        for waiting in self._suspects.values():
            waiting.clear()
        for number, lane in self.lanes.items():
            self.lanes[number] = Lane(lane.slots)

    def open_lane(self, number: int, slots: int, kv_tokens: int = 1 << 20) -> None:
        """An engine is up."""
        self.lanes[number] = Lane(slots)
        self.router.open(number, kv_tokens)

    def take(self, number: int) -> list[ItemT]:
        """Rows that the engine is to get now; none while a delivery would be too small to be worth it."""
        lane = self.lanes[number]
        if not lane.works:
            lane.mode = self._next_mode(number)
        room = lane.window - lane.num_sequences
        if lane.works and (lane.mode == Trust.ALONE or room < max(1, lane.window // 8)):
            return []
        taken: list[ItemT] = []
        while (size := self._next_size(number)) is not None and (room >= size or not lane.works):
            work = self.router.pop(number) if lane.mode == Trust.FREE else self._suspects[lane.mode].popleft()
            lane.works[work.index] = work
            lane.num_sequences += size
            room -= size
            taken.append(work)
            if lane.mode == Trust.ALONE:
                break
        return taken

    def _next_size(self, number: int) -> int | None:
        mode = self.lanes[number].mode
        if mode == Trust.FREE:
            return self.router.next_size(number)
        return self._suspects[mode][0].size if self._suspects[mode] else None

    def _next_mode(self, number: int) -> Trust:
        """Suspects first, unless another lane already has some and there is other work to do."""
        others = any(lane.mode != Trust.FREE and lane.works for n, lane in self.lanes.items() if n != number)
        if others and self.num_fresh:
            return Trust.FREE
        return next((kind for kind in (Trust.GROUP, Trust.ALONE) if self._suspects[kind]), Trust.FREE)

    def share(self) -> list[int]:
        """Lanes with nothing left on their shelf get some of what waits for others; which they are. After `take`."""
        hungry = [n for n, lane in self.lanes.items() if not self.router.waiting(n) and self._is_hungry(lane)]
        helped = []
        for thief in sorted(hungry, key=self.router.load):
            victims = [n for n in self.lanes if n != thief and self.router.waiting(n)]
            if victims and self.router.steal(thief, max(victims, key=self.router.load)):
                helped.append(thief)
        return helped

    def _is_hungry(self, lane: Lane[ItemT]) -> bool:
        """It takes free rows, and what it has will soon be running."""
        early = lane.slots // 4
        return lane.open and lane.num_sequences < lane.slots + max(1, early) and lane.queued <= early

    def done(self, number: int, work: ItemT) -> None:
        """A row of the lane has all its results, or was taken out of it."""
        lane = self.lanes[number]
        del lane.works[work.index]
        lane.num_sequences -= work.size
        if lane.mode == Trust.FREE:
            whole = len(work.results) == work.size
            made = sum(len(result.token_ids) for result in work.results.values())
            self.router.end(work.index, made if whole else None)

    def died(self, number: int) -> Verdict[ItemT]:
        """The lane's engine died: what each of its rows is to be remembered by, and the one that is put aside."""
        lane = self.lanes.pop(number)
        self.router.close(number)
        verdict: Verdict[ItemT] = Verdict()
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
                self._suspects[trust(work)].append(work)
        if lane.mode == Trust.ALONE and verdict.guilty is None:
            self._suspects[Trust.ALONE].rotate(1)  # the same row again: its other tries come at once
        if verdict.guilty is not None:
            self._clear_others()
        return verdict

    def _clear_others(self) -> None:
        for waiting in self._suspects.values():
            for work in waiting:
                work.tries.in_company = work.tries.alone = 0
                self.router.add(work)
            waiting.clear()

    def report(self, queued: Mapping[int, int | None]) -> None:
        """How many sequences wait in each lane's engine, by its own count; None: it told nothing new."""
        for number, count in queued.items():
            if number in self.lanes and count is not None:
                self.lanes[number].queued = count

    def rebalance(self) -> Move[ItemT] | None:
        """When nothing waits and a lane has free places and less to do: moves rows there that cannot be running yet
        where they are."""
        free_lanes = {n: lane for n, lane in self.lanes.items() if lane.open}
        if self.num_waiting or len(free_lanes) < 2:
            return None
        source = max(free_lanes, key=lambda n: free_lanes[n].excess)
        spare = {
            n: lane.slots - lane.num_sequences for n, lane in free_lanes.items() if n != source and not lane.queued
        }
        if not spare:
            return None
        target = max(spare, key=spare.__getitem__)
        room = min(free_lanes[source].excess, spare[target])
        if room < max(1, min(free_lanes[source].excess, self.lanes[target].slots // 16)):
            return None  # each move makes the source's ranks wait for a moment
        excess, unstarted = free_lanes[source].excess, []
        for work in reversed(self.lanes[source].works.values()):
            if work.size > excess or work.results:
                break
            excess -= work.size
            if not work.tries.total:  # else ranks died with it: its engine tries it alone, another would begin anew
                unstarted.append(work.index)
        chosen = set(self.router.move(unstarted, target, room))
        if not chosen:
            return None
        moved = [work for work in self.lanes[source].works.values() if work.index in chosen]
        self._transfer(moved, source, target)
        return Move(source, target, moved)

    def _transfer(self, moved: list[ItemT], source: int, target: int) -> None:
        giver, taker = self.lanes[source], self.lanes[target]
        taker.mode = Trust.FREE
        for work in moved:
            del giver.works[work.index]
            giver.num_sequences -= work.size
            giver.queued = max(0, giver.queued - work.size)
            taker.works[work.index] = work
            taker.num_sequences += work.size
