"""Which of several engines a waiting row is for: by the prefix it shares with other rows, else by load. Integers only.

Each lane (an engine) has a shelf of rows that wait for it. A row goes to the shelf of a lane that has, or will have,
its prefix in its cache; a row with nothing to share goes to the lane with the least to do for its cache. A lane whose
shelf is empty gets half of what another has too much, whole prefixes at a time, so that a prefix is computed again
only where idling would be dearer.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from shoal.driver.params import SamplingParams

# Blocks of a prompt's beginning whose hashes are looked up: a match is found to within a third of its length.
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_WORTH = 3  # a match that is less than this part of the prompt does not decide where it goes
_KNOWN_PREFIXES = 1 << 15  # remembered, least recently used first out
_FIRST_GUESS = 256  # tokens of an output, before any is known


class Routable(Protocol):
    """What routing looks at. `index`: unique, in order of arrival; `size`: sequences it becomes."""

    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def cache_salt(self) -> str | None: ...
    @property
    def priority(self) -> int: ...


ItemT = TypeVar("ItemT", bound=Routable)


@dataclass(slots=True)
class _Entry(Generic[ItemT]):
    """An item on a shelf, or in its lane's engine."""

    item: ItemT
    keys: tuple[int, ...]  # of its beginning, shortest first
    known_length: int  # of its output, 0 where it is not known
    tokens: int = 0  # what the lane has to compute and keep for it, as far as one can tell
    group: int = -1  # index in `keys`: what it shares with the rows it goes with
    shared: bool = False  # it goes with rows that came before
    lane: int = -1
    out: bool = False  # in the engine

    @property
    def ranked(self) -> tuple[int, int, int, _Entry[ItemT]]:
        """With its order among the waiting: by priority, long ones first where that is known, then as they came."""
        return self.item.priority, -self.known_length, self.item.index, self


@dataclass(slots=True)
class _Shelf(Generic[ItemT]):
    """What waits for one lane (a heap), and how much the lane has to do."""

    capacity: int  # tokens that its cache holds
    heap: list[tuple[int, int, int, _Entry[ItemT]]] = field(default_factory=list)
    waiting_tokens: int = 0
    held_tokens: int = 0  # of items in the engine
    prefixes: Counter[int] = field(default_factory=Counter)  # items it has, by what they share

    @property
    def load(self) -> float:
        """All it has, as a share of its cache."""
        return (self.waiting_tokens + self.held_tokens) / self.capacity


@dataclass(slots=True)
class _Homes:
    """Lanes of one prefix, as bits."""

    chosen: int = 0  # its rows go there
    warm: int = 0  # rows of it were handed to their engines


class Router(Generic[ItemT]):
    """Items by lane: waiting ones in order, handed-out ones for the count."""

    def __init__(self, block_size: int = 16, by_prefix: bool = True) -> None:
        """`block_size`: tokens that can be shared at once; `by_prefix`: whether engines share anything."""
        self._block_size, self._by_prefix = block_size, by_prefix
        self._shelves: dict[int, _Shelf[ItemT]] = {}
        self._loose: dict[int, _Entry[ItemT]] = {}  # by index: waiting while there is no lane
        self._entries: dict[int, _Entry[ItemT]] = {}  # by index: all others
        self._homes: OrderedDict[int, _Homes] = OrderedDict()
        self._outputs, self._output_tokens = 1, _FIRST_GUESS

    @property
    def num_waiting(self) -> int:
        """Items on shelves, or for no lane yet."""
        return len(self._loose) + sum(len(shelf.heap) for shelf in self._shelves.values())

    def waiting(self, lane: int) -> int:
        """Items on the lane's shelf."""
        return len(self._shelves[lane].heap)

    def load(self, lane: int) -> float:
        """What the lane has to do, as a share of its cache."""
        return self._shelves[lane].load

    def open(self, lane: int, kv_tokens: int) -> None:
        """A lane is there."""
        assert lane not in self._shelves
        self._shelves[lane] = _Shelf(max(1, kv_tokens))
        loose, self._loose = self._loose, {}
        for entry in loose.values():
            self._place(entry)

    def close(self, lane: int) -> None:
        """A lane is gone, and what its cache held. What waited for it goes to others; forget what was in its engine."""
        shelf = self._shelves.pop(lane)
        for homes in self._homes.values():
            homes.chosen &= ~(1 << lane)
            homes.warm &= ~(1 << lane)
        for *_, entry in sorted(shelf.heap):
            del self._entries[entry.item.index]
            self._place(entry)
        self._entries = {index: entry for index, entry in self._entries.items() if entry.lane != lane}

    def forget_items(self) -> None:
        """Nothing waits any more, and nothing is in an engine."""
        self._loose.clear()
        self._entries.clear()
        self._shelves = {lane: _Shelf(shelf.capacity) for lane, shelf in self._shelves.items()}

    def forget_prefixes(self) -> None:
        """The engines' caches were emptied."""
        self._homes.clear()

    def add(self, item: ItemT) -> None:
        """An item waits from now on."""
        params = item.params
        known = params.max_tokens or 0 if params.ignore_eos and not params.stop and not params.stop_token_ids else 0
        self._place(_Entry(item, self._keys(item), known))

    def remove(self, index: int) -> ItemT | None:
        """Takes back an item that waits; None if it does not."""
        if index in self._loose:
            return self._loose.pop(index).item
        entry = self._entries.get(index)
        if entry is None or entry.out:
            return None
        shelf = self._shelves[entry.lane]
        shelf.heap.remove(entry.ranked)
        heapq.heapify(shelf.heap)
        self._leave(entry)
        return self._entries.pop(index).item

    def next_size(self, lane: int) -> int | None:
        """Size of the item that `pop` would give; None where nothing waits for the lane."""
        heap = self._shelves[lane].heap
        return heap[0][3].item.size if heap else None

    def pop(self, lane: int) -> ItemT:
        """The next item for the lane's engine."""
        shelf = self._shelves[lane]
        entry = heapq.heappop(shelf.heap)[3]
        entry.out = True
        shelf.waiting_tokens -= entry.tokens
        shelf.held_tokens += entry.tokens
        self._warm(entry, lane)
        return entry.item

    def end(self, index: int, num_output_tokens: int | None) -> None:
        """An item left its engine: with so many tokens, or (None) without an answer."""
        entry = self._entries.pop(index)
        self._leave(entry)
        if num_output_tokens is not None:
            self._outputs += entry.item.size
            self._output_tokens += num_output_tokens

    def steal(self, thief: int, victim: int) -> int:
        """Evens out what the two have: rows go from the victim's shelf to the thief's; how many it were."""
        source = self._shelves[victim]
        taken = self._worthwhile([entry for *_, entry in sorted(source.heap, reverse=True)], victim, thief, 1)
        chosen = {entry.item.index for entry in taken}
        for entry in taken:
            self._leave(entry)
        source.heap = [ranked for ranked in source.heap if ranked[2] not in chosen]
        heapq.heapify(source.heap)
        self._settle(taken, victim, thief)
        return len(taken)

    def move(self, indices: Iterable[int], lane: int, most: int) -> list[int]:
        """Of items in an engine, those that had better be in the other lane's, of `most` sequences at most. They count
        as handed out there from now on. `indices`: of one lane, the first to go first.

        A queue alone is no reason: both engines have one while they compute prompts, and rows would go to and fro."""
        entries = [self._entries[index] for index in indices]
        taken, least = [], int(not self._shelves[lane].held_tokens)  # whoever has nothing gets something
        for entry in self._worthwhile(entries, entries[0].lane, lane, least) if entries else []:
            if entry.item.size <= most:
                most -= entry.item.size
                taken.append(entry)
        for entry in taken:
            self._leave(entry)
        self._settle(taken, entries[0].lane if entries else lane, lane)
        return [entry.item.index for entry in taken]

    def _worthwhile(self, entries: Iterable[_Entry[ItemT]], victim: int, thief: int, least: int) -> list[_Entry[ItemT]]:
        """Which of these to move so that the two have about as much to do; at least so many that cost nothing extra.

        Rows that share nothing go first, and prefixes that the victim has not begun; then others, the largest first.
        One that the thief has to compute again goes only if the thief then has clearly less to do than the victim.
        """
        source, target = self._shelves[victim], self._shelves[thief]
        groups: dict[int, list[_Entry[ItemT]]] = {}
        for entry in entries:
            groups.setdefault(entry.keys[entry.group] if entry.keys else -1, []).append(entry)
        gap = source.load - target.load
        taken: list[_Entry[ItemT]] = []
        for again, rows in sorted(
            ((self._again(rows[0], thief, victim), rows) for rows in groups.values()),
            key=lambda pair: (pair[0], -sum(row.tokens for row in pair[1])),
        ):
            for entry in rows:
                left = gap - entry.tokens / source.capacity - (entry.tokens + 2 * again) / target.capacity
                if left < 0 and (again or len(taken) >= least):
                    break
                gap = left
                taken.append(entry)
                again = 0
        return taken

    def _settle(self, taken: list[_Entry[ItemT]], victim: int, thief: int) -> None:
        """Entries that left one lane come to another."""
        for entry in taken:
            entry.tokens += self._again(entry, thief, victim)
            if entry.out:
                self._warm(entry, thief)
        left = {entry.keys[entry.group] for *_, entry in self._shelves[victim].heap if entry.keys} if taken else set()
        for entry in taken:
            for key in entry.keys[entry.group :]:  # a prefix that the victim never began has moved as a whole
                homes = self._home(key)
                if key not in left and not homes.warm >> victim & 1:
                    homes.chosen &= ~(1 << victim)
            self._put(entry, thief)

    def _again(self, entry: _Entry[ItemT], thief: int, victim: int) -> int:
        """Tokens of the row's prefix, if the victim's cache has them and the thief's has not."""
        if not entry.shared:
            return 0
        homes = self._home(entry.keys[entry.group])
        return DEPTHS[entry.group] * self._block_size if homes.warm >> victim & 1 and not homes.warm >> thief & 1 else 0

    def _place(self, entry: _Entry[ItemT]) -> None:
        """Onto the shelf of the lane that suits it best."""
        if not self._shelves:
            self._loose[entry.item.index] = entry
            return
        lanes, shared = self._matching(entry)
        if len(self._shelves) == 1:
            lane = next(iter(self._shelves))
        else:
            lane = min(lanes, key=self.load if shared else self._new_score)
        prompt, size = len(entry.item.prompt_token_ids), entry.item.size
        entry.tokens = max(1, prompt - shared) + size * self._output_length(entry)
        self._put(entry, lane)

    def _new_score(self, lane: int) -> float:
        """For a prefix not met before: load counts, and so does what the lane's prefixes will bring."""
        total = sum(shelf.load for shelf in self._shelves.values()) or 1
        prefixes = sum(len(shelf.prefixes) for shelf in self._shelves.values()) or 1
        shelf = self._shelves[lane]
        return shelf.load / total + len(shelf.prefixes) / prefixes

    def _put(self, entry: _Entry[ItemT], lane: int) -> None:
        shelf = self._shelves[lane]
        entry.lane = lane
        self._entries[entry.item.index] = entry
        if entry.out:
            shelf.held_tokens += entry.tokens
        else:
            heapq.heappush(shelf.heap, entry.ranked)
            shelf.waiting_tokens += entry.tokens
        if entry.keys:
            shelf.prefixes[entry.keys[entry.group]] += 1
        for key in entry.keys:
            self._home(key).chosen |= 1 << lane

    def _leave(self, entry: _Entry[ItemT]) -> None:
        """Out of its lane's counts."""
        shelf = self._shelves[entry.lane]
        if entry.out:
            shelf.held_tokens -= entry.tokens
        else:
            shelf.waiting_tokens -= entry.tokens
        if entry.keys:
            key = entry.keys[entry.group]
            shelf.prefixes[key] -= 1
            if not shelf.prefixes[key]:
                del shelf.prefixes[key]

    def _warm(self, entry: _Entry[ItemT], lane: int) -> None:
        for key in entry.keys[: entry.group + 1]:
            self._home(key).warm |= 1 << lane

    def _matching(self, entry: _Entry[ItemT]) -> tuple[Iterable[int], int]:
        """Lanes for it, and how many tokens it shares with rows that went there."""
        for place in range(len(entry.keys) - 1, -1, -1):
            tokens = DEPTHS[place] * self._block_size
            if tokens * _WORTH < len(entry.item.prompt_token_ids):
                break
            homes = self._homes.get(entry.keys[place])
            lanes = [] if homes is None else [lane for lane in self._shelves if homes.chosen >> lane & 1]
            if lanes:
                entry.group, entry.shared = place, True
                return lanes, tokens
        entry.group, entry.shared = len(entry.keys) - 1, False
        return self._shelves, 0

    def _output_length(self, entry: _Entry[ItemT]) -> int:
        if entry.known_length:
            return entry.known_length
        mean = self._output_tokens // self._outputs
        return max(1, min(mean, entry.item.params.max_tokens or mean))

    def _keys(self, item: ItemT) -> tuple[int, ...]:
        """Hashes of the prompt's first 1, 2, 3, 4, 6 ... blocks; the last token is always computed."""
        if not self._by_prefix:
            return ()
        ids, keys, start = item.prompt_token_ids, [], 0
        key = hash(item.cache_salt)
        for depth in DEPTHS:
            end = depth * self._block_size
            if end >= len(ids):
                break
            key = hash((key, tuple(ids[start:end])))
            keys.append(key)
            start = end
        return tuple(keys)

    def _home(self, key: int) -> _Homes:
        homes = self._homes.get(key)
        if homes is None:
            homes = self._homes[key] = _Homes()
            if len(self._homes) > _KNOWN_PREFIXES:
                self._homes.popitem(last=False)
        else:
            self._homes.move_to_end(key)
        return homes
