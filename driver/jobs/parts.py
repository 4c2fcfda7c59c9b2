"""Parts of a folder output: each covers a range of input rows and appears as soon as all of them are durable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from shoal.driver.jobs.publish import OutputPlan, Publisher


class Parts:
    """Counts rows of each part and publishes those that are complete."""

    def __init__(self, plan: OutputPlan, publisher: Publisher, rows_per_part: int, rewrite: bool) -> None:
        """`rewrite`: parts of earlier runs count for nothing."""
        self._rewrite = rewrite
        self._plan, self._publisher, self._size = plan, publisher, rows_per_part
        self._settled: Counter[int] = Counter()
        self._published: set[int] = set()
        self._changed: set[int] = set()  # parts with rows that this run settled

    def settled(self, indices: Iterable[int], new: bool) -> None:
        """Rows that are durable now; `new`: this run settled them."""
        touched = set()
        for index in indices:
            number = index // self._size
            self._settled[number] += 1
            touched.add(number)
        if new:
            self._changed |= touched
        for number in sorted(touched):
            if self._settled[number] == self._size:
                self._publish(number, (number + 1) * self._size)

    def finish(self, num_rows: int) -> int:
        """Publishes the last part, which may cover fewer rows, and removes parts beyond it; how many there are."""
        count = -(-num_rows // self._size)
        for number in range(count):
            if number not in self._published:
                self._publish(number, min(num_rows, (number + 1) * self._size))
        self._remove_from(count)
        return count

    def _publish(self, number: int, stop: int) -> None:
        """Writes a part, unless an earlier run of the same job wrote the same."""
        if self._rewrite or number in self._changed or not self._plan.filesystem.exists(self._plan.part(number)):
            self._publisher.publish_part(number, number * self._size, stop)
            self._changed.discard(number)
        self._published.add(number)
        self._settled.pop(number, None)

    def _remove_from(self, number: int) -> None:
        """An earlier run of this output may have had more rows."""
        files = self._plan.filesystem
        while True:
            beyond = [path for path in (self._plan.part(number), self._plan.error_part(number)) if path is not None]
            there = [path for path in beyond if files.exists(path)]
            if not there:
                return
            for path in there:
                files.rm_file(path)
            number += 1
