"""RowBatch: the prompts of one generate or chat call, from raw prompts to RequestOutputs."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shoal.driver.binding import Binder, Bound, Row
from shoal.driver.detokenize import TextDecoder
from shoal.driver.feed import Batch, request_failure
from shoal.driver.inputs import CHUNK_CHARS, CHUNK_TEXTS, InputProcessor, Prompt, TokenizeOptions
from shoal.driver.outputs import RequestOutput, error_output, make_output
from shoal.driver.params import SamplingParams
from shoal.driver.request import EngineRequest, FinishedRequest

OnError = Literal["raise", "return"]


@dataclass(slots=True)
class RowTools:
    """What turns prompts into requests and results into outputs: the same for all calls of a client."""

    inputs: InputProcessor
    binder: Binder
    decoder: TextDecoder | None
    log_stats: bool


@dataclass(slots=True)
class _Open:
    """A row with children in the driver, or still to go there."""

    row: Row
    n: int
    taken: int  # children handed out
    results: dict[int, FinishedRequest]


class RowBatch(Batch):
    """Rows in input order; made ready in chunks, in order of (priority, index)."""

    def __init__(
        self,
        tools: RowTools,
        raws: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        parse: Callable[[Any], Prompt],
        options: TokenizeOptions,
        priorities: Sequence[int] | None,
        on_error: OnError,
        numbers: tuple[int, int],
        noun: str = "prompt",
    ) -> None:
        """`numbers`: the first request number and the first sequence number of this call."""
        self._tools, self._raws, self._parse, self._options = tools, raws, parse, options
        self._on_error, self._noun = on_error, noun
        self._first_request = numbers[0]
        self._priorities = priorities
        self._bounds = self._bind(params)
        self._sequences = self._number(numbers[1])
        indices = range(len(raws))
        self._order: Sequence[int] = (
            indices if priorities is None else sorted(indices, key=lambda i: (priorities[i], i))
        )
        self._cursor = 0
        self._ready: deque[_Open] = deque()
        self._again: deque[tuple[_Open, int]] = deque()
        self._running: dict[int, tuple[_Open, int]] = {}
        self._settled_rows = 0
        self.outputs: list[RequestOutput | None] = [None] * len(raws)

    @property
    def num_sequences(self) -> int:
        """All children of all rows."""
        return self._sequences[-1] - self._sequences[0]

    @property
    def request_ids(self) -> list[str]:
        """One for each row, in input order."""
        return [self._id(index) for index in range(len(self._raws))]

    @property
    def done(self) -> bool:
        """Every row has its output."""
        return self._settled_rows == len(self._raws)

    @property
    def num_ready(self) -> int:
        """Rows made ready and not yet wholly taken."""
        return len(self._ready) + len(self._again)

    def prepare(self) -> bool:
        """Parses and tokenizes the next chunk of rows."""
        chunk: list[tuple[int, Prompt]] = []
        chars = 0
        start = self._cursor
        while self._cursor < len(self._order) and len(chunk) < CHUNK_TEXTS and chars < CHUNK_CHARS:
            index = self._order[self._cursor]
            self._cursor += 1
            try:
                prompt = self._parse(self._raws[index])
            except (TypeError, ValueError, NotImplementedError) as error:
                self._fail(index, None, error)
            else:
                chunk.append((index, prompt))
                chars += len(prompt.text or "")
            if self.failure is not None:
                return False
        found = self._tools.inputs.tokenize([prompt for _, prompt in chunk], self._options)
        for (index, prompt), ids in zip(chunk, found, strict=True):
            self._admit(index, prompt, ids)
            if self.failure is not None:
                return False
        return self._cursor > start

    def take(self, room: int) -> list[EngineRequest]:
        """The next children; a row's may be spread over several calls."""
        requests: list[EngineRequest] = []
        while room > len(requests) and self._again:
            requests += self._hand_out(*self._again.popleft(), 1)
        while room > len(requests) and self._ready:
            state = self._ready[0]
            count = min(room - len(requests), state.n - state.taken)
            requests += self._hand_out(state, state.taken, count)
            state.taken += count
            if state.taken == state.n:
                self._ready.popleft()
        return requests

    def finish(self, result: FinishedRequest) -> None:
        """Keeps a child's result; with the last child, the row gets its output."""
        entry = self._running.get(result.number)
        if entry is None:
            return
        state, child = entry
        row = state.row
        if result.finish_reason == "error" and self._on_error == "raise":
            self.failure = request_failure(row.index, self._noun, result.error)
            return
        state.results[child] = result
        if len(state.results) == state.n:
            self._settle_row(state)
        self.num_settled += 1
        self.num_input_tokens += len(row.token_ids)
        self.num_output_tokens += len(result.token_ids)
        del self._running[result.number]

    def requeue(self, numbers: Iterable[int]) -> None:
        """Lets children run again; their random streams are their own, so they come out the same."""
        for number in sorted(numbers):
            if number in self._running:
                self._again.append(self._running.pop(number))

    def _hand_out(self, state: _Open, first_child: int, count: int) -> list[EngineRequest]:
        requests = self._tools.binder.requests(state.row, first_child, count)
        for child, request in enumerate(requests, first_child):
            self._running[request.number] = (state, child)
        return requests

    def _bind(self, params: SamplingParams | Sequence[SamplingParams]) -> list[Bound | Exception]:
        """What each row's parameters mean for the model; the same object is looked at once."""
        if isinstance(params, SamplingParams):
            return [self._tools.binder.bind(params)] * len(self._raws)
        known: dict[int, Bound | Exception] = {}
        for index, one in enumerate(params):
            if id(one) in known:
                continue
            try:
                known[id(one)] = self._tools.binder.bind(one)
            except ValueError as error:
                if self._on_error == "raise":
                    raise self._named(index, error) from None
                known[id(one)] = error
        return [known[id(one)] for one in params]

    def _number(self, first: int) -> list[int]:
        """Number of each row's child 0, and the number after the last child of all."""
        counts = (1 if isinstance(bound, Exception) else bound.params.n for bound in self._bounds)
        return list(itertools.accumulate(counts, initial=first))

    def _admit(self, index: int, prompt: Prompt, ids: list[int] | Exception) -> None:
        bound = self._bounds[index]
        error = ids if isinstance(ids, Exception) else bound if isinstance(bound, Exception) else None
        if error is not None or isinstance(ids, Exception) or isinstance(bound, Exception):
            assert error is not None
            self._fail(index, prompt, error)
            return
        row = Row(
            index=index,
            request_number=self._first_request + index,
            first_sequence=self._sequences[index],
            prompt=prompt.text,
            token_ids=ids,
            bound=bound,
            priority=0 if self._priorities is None else self._priorities[index],
            cache_salt=prompt.cache_salt,
        )
        try:
            self._tools.binder.check_length(row)
        except ValueError as too_short:
            self._fail(index, prompt, too_short)
        else:
            self._ready.append(_Open(row, bound.params.n, 0, {}))

    def _fail(self, index: int, prompt: Prompt | None, error: Exception) -> None:
        if self._on_error == "raise":
            self.failure = self._named(index, error)
            return
        text = None if prompt is None else prompt.text
        ids = None if prompt is None else prompt.token_ids
        self.outputs[index] = error_output(self._id(index), text, ids, str(error))
        self.num_settled += self._sequences[index + 1] - self._sequences[index]
        self._settled_rows += 1

    def _named(self, index: int, error: Exception) -> Exception:
        """The same exception, its message saying which row it is about."""
        error.args = (f"{self._noun} {index}: {error}",)
        return error

    def _settle_row(self, state: _Open) -> None:
        row = state.row
        children = [state.results[child] for child in range(state.n)]
        again = self.outputs[row.index] is not None  # an interrupt came between here and the end of `finish`
        self.outputs[row.index] = make_output(
            self._id(row.index),
            row.prompt,
            row.token_ids,
            row.bound.params,
            children,
            self._tools.decoder,
            self._tools.log_stats,
        )
        self._settled_rows += not again

    def _id(self, index: int) -> str:
        return str(self._first_request + index)
