"""Rows of the input to work for engines: skips what is done, renders templates, tokenizes, checks parameters.

Runs in a thread of its own, a few chunks ahead of the engines and no more.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.driver.binding import Binder, Bound, Row
from shoal.driver.chat import ChatRenderer
from shoal.driver.dispatch import Tries
from shoal.driver.inputs import InputProcessor, Prompt, parse_prompt
from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.forms.base import Form, RowRequest
from shoal.driver.jobs.keys import KeyTable, stream_number
from shoal.driver.jobs.scan import InputRow, Scanner, raw_rows
from shoal.driver.jobs.sources.registry import SourceRow
from shoal.driver.jobs.work import Chunk, Settled, Work
from shoal.driver.params import SamplingParams

CHUNK_ROWS = 256
CHUNK_BYTES = 4 << 20
_KNOWN_SETS = 1024  # sampling parameters and chat renderers that are kept

T = TypeVar("T")


@dataclass(slots=True)
class ModelTools:
    """What rows need of the model; known only when an engine is up."""

    inputs: InputProcessor
    binder: Binder
    tokenizer: Any
    chat_template: str | None
    default_sampling: dict[str, Any]  # of the model's generation_config


class Preparer:
    """The input as chunks, in order. For one thread."""

    def __init__(
        self,
        config: JobConfig,
        form: Form,
        files: Sequence[InputFile],
        scanner: Scanner,
        done: KeyTable,
        tries: dict[bytes, Tries],
        tools: Future[ModelTools],
    ) -> None:
        """`done`: location in the ledger of rows that need nothing; `tries`: of rows that were in an engine that died.

        `tools` is waited for when the first row comes that needs an engine, not before.
        """
        self._config, self._form = config, form
        self._rows = raw_rows(files, config.max_line_bytes)
        self._scanner, self._done, self._tries, self._tools = scanner, done, tries, tools
        self._bounds: OrderedDict[str, Bound] = OrderedDict()
        self._renderers: OrderedDict[str, ChatRenderer] = OrderedDict()

    def scanned(self) -> Iterator[tuple[list[Settled], list[InputRow]]]:
        """For each chunk: what is settled, and the rows that need an engine."""
        while chunk := self._next_rows():
            rows = self._scanner.scan(chunk)
            settled: list[Settled] = []
            needy: list[InputRow] = []
            for row, location in zip(rows, self._done.find([row.key for row in rows]).tolist(), strict=True):
                if location >= 0:
                    settled.append(Settled(row.index, location))
                elif row.fault is not None:
                    settled.append(Settled(row.index, -1, row.row_id, row.key, row.columns, row.fault))
                else:
                    needy.append(row)
            yield settled, needy

    def _next_rows(self) -> list[tuple[int, InputFile, SourceRow]]:
        found: list[tuple[int, InputFile, SourceRow]] = []
        size = 0
        for item in self._rows:
            found.append(item)
            size += len(item[2].raw)
            if len(found) == CHUNK_ROWS or size >= CHUNK_BYTES:
                break
        return found

    def chunk(self, settled: list[Settled], needy: list[InputRow]) -> Chunk:
        """The chunk, its rows ready for an engine. Waits for the model where any row needs it."""
        result = Chunk(len(settled) + len(needy), settled=settled)
        if not needy:
            return result
        tools = self._tools.result()
        ready: dict[bool, list[tuple[InputRow, Prompt, Bound]]] = {True: [], False: []}
        for row in needy:
            assert row.columns is not None
            try:
                request = self._form.request(row.columns)
                prompt, bound = self._bind(request, tools)
            except RowError as error:
                result.settled.append(_failed(row, error.fault))
            else:
                ready[request.messages is None].append((row, prompt, bound))
        for special, group in ready.items():  # a chat template's text has its special tokens already
            options = tools.inputs.options(None, special)
            found = tools.inputs.tokenize([prompt for _, prompt, _ in group], options)
            for (row, prompt, bound), ids in zip(group, found, strict=True):
                self._admit(result, row, prompt, bound, ids, tools)
        result.work.sort(key=lambda work: work.index)
        return result

    def _admit(
        self, result: Chunk, row: InputRow, prompt: Prompt, bound: Bound, ids: list[int] | Exception, tools: ModelTools
    ) -> None:
        if isinstance(ids, Exception):
            result.settled.append(_failed(row, Fault("invalid_prompt", "tokenize", str(ids))))
            return
        ready = Row(row.index, stream_number(row.row_id), 0, prompt.text, ids, bound)
        try:
            tools.binder.check_length(ready)
        except ValueError as error:
            result.settled.append(_failed(row, Fault("invalid_parameter", "parameters", str(error))))
            return
        assert row.columns is not None
        work = Work(row.index, row.row_id, row.key, row.columns, ready)
        if row.key in self._tries:
            work.tries = self._tries.pop(row.key)
        result.work.append(work)

    def _bind(self, request: RowRequest, tools: ModelTools) -> tuple[Prompt, Bound]:
        if self._config.strict_model and request.model not in (None, self._config.engine.model):
            message = f"the row asks for the model {request.model!r}, the job runs {self._config.engine.model!r}"
            raise RowError("model_mismatch", "parameters", message)
        bound = self._bound(request, tools)
        chat = request.messages is not None
        try:
            return (
                self._renderer(request.chat, tools)(request.messages) if chat else parse_prompt(request.prompt)
            ), bound
        except (TypeError, ValueError, NotImplementedError) as error:
            what, stage = ("messages", "template") if chat else ("prompt", "tokenize")
            raise RowError(f"invalid_{what}", stage, str(error)) from None

    def _bound(self, request: RowRequest, tools: ModelTools) -> Bound:
        """Rows mostly share their parameters: each set is checked once."""
        merged = {**request.fallback, **tools.default_sampling, **self._config.sampling_params, **request.sampling}
        try:
            name = json.dumps(merged, sort_keys=True)
            known = self._bounds.get(name)
            if known is None:
                known = _remember(self._bounds, name, tools.binder.bind(SamplingParams.from_optional(**merged)))
        except (TypeError, ValueError, OverflowError) as error:
            raise RowError("invalid_parameter", "parameters", str(error)) from None
        return known

    def _renderer(self, chat: dict[str, Any], tools: ModelTools) -> ChatRenderer:
        arguments = {**chat}
        extra = arguments.pop("chat_template_kwargs", None)
        if extra is not None and not isinstance(extra, dict):
            raise TypeError(f"chat_template_kwargs must be an object, got {type(extra).__name__}")
        arguments["chat_template_kwargs"] = {**self._config.chat_template_kwargs, **(extra or {})}
        arguments.setdefault("chat_template", tools.chat_template)
        name = json.dumps(arguments, sort_keys=True)
        known = self._renderers.get(name)
        if known is None:
            known = _remember(self._renderers, name, ChatRenderer(tools.tokenizer, **arguments))
        return known


def _failed(row: InputRow, fault: Fault) -> Settled:
    return Settled(row.index, -1, row.row_id, row.key, row.columns, fault)


def _remember(known: OrderedDict[str, T], name: str, value: T) -> T:
    known[name] = value
    if len(known) > _KNOWN_SETS:
        known.popitem(last=False)
    return value
