"""What is in a job's input: rows, lengths, duplicates, shared beginnings, rows that will be refused. No engine."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from shoal.driver.binding import Row
from shoal.driver.jobs.accounts import bucket
from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.forms.base import Form, RowRequest
from shoal.driver.jobs.keys import RowKeys
from shoal.driver.jobs.model import ModelTools
from shoal.driver.jobs.packed import pack_ids
from shoal.driver.jobs.prepare import BoundSet, Ready, RowPreparer
from shoal.driver.jobs.scan import InputRow, Scanner, raw_rows

_CHUNK = 512
_MOST_LISTED = 1000  # refused rows that are kept by line


@dataclass(frozen=True, slots=True)
class Asked:
    """What one row needs, in tokens."""

    prompt: int
    shared: int  # of the prompt, a beginning that an earlier row had
    output: int  # at most, all its sequences together


@dataclass(slots=True)
class Survey:
    """What was found."""

    num_rows: int = 0  # read
    complete: bool = True  # there are no rows beyond those
    num_tokenized: int = 0  # of those that are not refused by reading alone
    refused: Counter[str] = field(default_factory=Counter)
    refused_by_reading: int = 0
    listed: list[str] = field(default_factory=list)
    duplicates: int = 0  # rows whose tokens and parameters an earlier row has
    lengths: Counter[int] = field(default_factory=Counter)  # of prompts, by bucket
    asked: list[Asked] = field(default_factory=list)
    longest: int = 0  # tokens of the row that may get longest

    @property
    def num_usable(self) -> int:
        """Rows that an engine is to answer, refused ones among the untokenized left aside."""
        return self.num_rows - sum(self.refused.values())

    @property
    def scale(self) -> float:
        """Usable rows over those whose tokens are known."""
        return self.num_usable / len(self.asked) if self.asked else 0.0

    def refuse(self, row: InputRow, fault: Fault) -> None:
        """A row that will have no answer."""
        self.refused[fault.code] += 1
        if len(self.listed) < _MOST_LISTED:
            self.listed.append(f"{row.place}: {fault.code}: {fault.message}")


def survey(
    config: JobConfig, form: Form, files: Sequence[InputFile], keys: RowKeys, tools: ModelTools, most_tokenized: int
) -> Survey:
    """Reads up to `config.validate_rows` rows and tokenizes the first `most_tokenized` of those that can be used."""
    found, shapes = Survey(), _Shapes(tools, config.engine.block_size)
    only_model = config.engine.model if config.strict_model else None
    preparer = RowPreparer(tools, config.sampling_params, config.chat_template_kwargs, only_model)
    scanner, rows = Scanner(form, keys), raw_rows(files, config.max_line_bytes)
    while chunk := list(itertools.islice(rows, min(_CHUNK, config.validate_rows - found.num_rows))):
        found.num_rows += len(chunk)
        good: list[tuple[InputRow, RowRequest]] = []
        for row in scanner.scan(chunk):
            fault = row.fault
            if fault is not None:
                found.refused_by_reading += 1
            elif found.num_tokenized + len(good) < most_tokenized:
                try:
                    good.append((row, form.request(row.columns or {})))
                except RowError as error:
                    fault = error.fault
            if fault is not None:
                found.refuse(row, fault)
        found.num_tokenized += len(good)
        for (row, _), ready in zip(good, preparer.prepare([request for _, request in good]), strict=True):
            if isinstance(ready, Fault):
                found.refuse(row, ready)
            else:
                shapes.add(found, ready)
    found.complete = next(rows, None) is None
    return found


class _Shapes:
    """Lengths, and what of them was there before."""

    def __init__(self, tools: ModelTools, block_size: int) -> None:
        self._binder, self._bounds, self._block_size = tools.binder, BoundSet(tools), block_size
        self._blocks: set[bytes] = set()
        self._rows: set[bytes] = set()

    def add(self, found: Survey, ready: Ready) -> None:
        """One more row."""
        ids, bound = ready.token_ids, self._bounds.find(ready.sampling)
        params: Any = bound.params
        raw = pack_ids(ids)
        row = blake2b(raw + ready.sampling.encode(), digest_size=12).digest()
        found.duplicates += row in self._rows
        self._rows.add(row)
        output = self._binder.room(Row(0, 0, 0, None, ids, bound))
        found.lengths[bucket(len(ids))] += 1
        found.longest = max(found.longest, len(ids) + output)
        found.asked.append(Asked(len(ids), self._shared(raw, len(ids)), output * params.n))

    def _shared(self, raw: bytes, num_tokens: int) -> int:
        """Tokens at the beginning, in whole blocks, that an earlier prompt began with too; never the last token."""
        size, shared, digest = 4 * self._block_size, 0, b""
        known = True
        for start in range(0, len(raw) - size + 1, size):
            digest = blake2b(digest + raw[start : start + size], digest_size=8).digest()
            known = known and digest in self._blocks
            shared += self._block_size * known
            self._blocks.add(digest)
        return min(shared, num_tokens - 1)
