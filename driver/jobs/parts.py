"""Parts of a folder output: each covers a range of input rows and appears as soon as all of them are durable.

What each part was made of is kept beside the ledger, so that whoever resumes knows which parts are still as they should
be: a run may have ended between a row's new answer and the part that shows it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from shoal.driver.jobs.publish import OutputPlan, Publisher
from shoal.driver.jobs.state.store import StateStore

PARTS_FILE = "parts.json"
_SAVE_S = 5.0  # parts that a run which ends suddenly has written since then are written again


class Parts:
    """Counts rows of each part and publishes those that are complete."""

    def __init__(
        self, plan: OutputPlan, publisher: Publisher, store: StateStore, rows_per_part: int, order: str
    ) -> None:
        """Parts of an earlier run that were cut or ordered in another way are removed: all are made anew."""
        self._plan, self._publisher, self._store, self._size = plan, publisher, store, rows_per_part
        self._settled: Counter[int] = Counter()
        self._published: set[int] = set()
        self._cut = {
            "format": plan.format,
            "rows_per_part": rows_per_part,
            "order": order,
            "errors_apart": plan.error_path is not None,
        }
        self._made_of: dict[str, str] = {}  # of each part that is there, by its number
        self._saved = time.monotonic()
        found = store.get(PARTS_FILE)
        if found is None:
            return
        earlier = json.loads(found)
        if earlier["cut"] == self._cut:
            self._made_of = earlier["made_of"]
        else:
            self._save()
            self._remove_cut(earlier["cut"])

    def settled(self, indices: Iterable[int]) -> None:
        """Rows that are durable now."""
        touched = set()
        for index in indices:
            number = index // self._size
            self._settled[number] += 1
            touched.add(number)
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
        self._made_of = {number: made_of for number, made_of in self._made_of.items() if int(number) < count}
        self._save()
        return count

    def _publish(self, number: int, stop: int) -> None:
        """Writes a part, unless the one that is there was made of the same records."""
        start, name = number * self._size, str(number)
        made_of = self._publisher.made_of(start, stop)
        if self._made_of.get(name) != made_of or not self._is_there(number):
            if self._made_of.pop(name, None) is not None:
                self._save()  # before it is overwritten: what it was made of then is not what it shows
            self._publisher.publish_part(number, start, stop)
            self._made_of[name] = made_of
            if time.monotonic() - self._saved > _SAVE_S:
                self._save()
        self._published.add(number)
        self._settled.pop(number, None)

    def _save(self) -> None:
        self._store.put(PARTS_FILE, json.dumps({"cut": self._cut, "made_of": self._made_of}).encode())
        self._saved = time.monotonic()

    def _paths(self, number: int) -> list[str]:
        return [path for path in (self._plan.part(number), self._plan.error_part(number)) if path is not None]

    def _is_there(self, number: int) -> bool:
        return all(self._plan.filesystem.exists(path) for path in self._paths(number))

    def _remove_from(self, number: int) -> None:
        """An earlier run of this output may have had more rows."""
        files = self._plan.filesystem
        while there := [path for path in self._paths(number) if files.exists(path)]:
            for path in there:
                files.rm_file(path)
            number += 1

    def _remove_cut(self, cut: dict[str, Any]) -> None:
        """All parts that were cut so: beside those of this run they would show rows twice, or not at all."""
        files = self._plan.filesystem
        errors = f"{self._plan.path}/_errors" if cut["errors_apart"] else None
        old = replace(self._plan, format=cut["format"], error_path=errors)
        name = re.compile(r"part-\d{5,}\." + re.escape(old.format))
        for folder in (old.path, old.error_path):
            if folder is None or not files.exists(folder):
                continue
            for path in files.ls(folder, detail=False):
                if name.fullmatch(os.path.basename(path)):
                    files.rm_file(path)
