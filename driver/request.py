"""Requests as they travel between client and driver, and as the scheduler keeps them. Integers, no tensors."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from shoal.workers.plan import RowSampling, TokenLogprobs, concat_logprobs

if TYPE_CHECKING:
    from shoal.driver.params import SamplingParams


@dataclass(slots=True)
class EngineRequest:
    """What a client hands to the driver: one sequence to generate (n > 1 is n of these)."""

    number: int  # the client's own count, in input order; unique for the client's life
    prompt_token_ids: list[int]
    params: SamplingParams  # max_tokens filled in, validated against model and tokenizer
    stop_ids: tuple[int, ...] = ()  # all ids that end the row: EOS (unless ignored) and stop_token_ids
    eos_ids: tuple[int, ...] = ()  # those of stop_ids whose stop_reason is None
    bad_words: tuple[tuple[int, ...], ...] = ()  # params.bad_words, tokenized
    stream: int = 0  # key of its random stream, unsigned 64 bits
    priority: int = 0  # lower runs first, under scheduling_policy="priority"
    cache_salt: str | None = None
    arrival_time: float = 0.0  # time.time() when the client made it
    num_solo_deaths: int = 0  # times that ranks died with it alone, before this driver

    def row_sampling(self) -> RowSampling:
        """What the ranks' sampler needs of it."""
        params = self.params
        return RowSampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            stream=self.stream,
            min_tokens=params.min_tokens,
            stop_ids=tuple(self.stop_ids),
            logit_bias=tuple((params.logit_bias or {}).items()),
            allowed_token_ids=tuple(params.allowed_token_ids or ()),
            bad_words=self.bad_words,
            num_logprobs=params.logprobs,
            num_prompt_logprobs=params.prompt_logprobs,
            extra_args=params.extra_args or {},
        )


@dataclass(slots=True)
class RequestStateStats:
    """When things happened to a request, in seconds of time.time()."""

    num_generation_tokens: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    num_preemptions: int = 0

    @property
    def first_token_latency(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token_ts - self.arrival_time


@dataclass(slots=True)
class FinishedRequest:
    """What the driver gives back for one EngineRequest."""

    number: int
    token_ids: list[int]
    finish_reason: str  # "stop", "length", "abort", "error"
    stop_reason: int | str | None = None
    stop_text: str | None = None  # set when a stop string ended it: its text, cut as include_stop_str_in_output says
    error: str | None = None  # with finish_reason "error"
    error_code: str | None = None  # with finish_reason "error": "engine_killed", "out_of_memory", or None
    num_cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None  # one entry a generated token
    prompt_logprobs: TokenLogprobs | None = None  # one entry for each prompt token but the first
    metrics: RequestStateStats | None = None


@dataclass(slots=True)
class Death:
    """The ranks died, and what that means for the requests in their plans."""

    reason: str
    tried: list[tuple[int, bool]] = field(default_factory=list)  # request number, whether it was alone
    guilty: list[int] = field(default_factory=list)  # ended with an error; the others are cleared by it


class Trust(enum.IntEnum):
    """In what company a request may run."""

    FREE = 0
    GROUP = 1
    ALONE = 2


class RequestBatch(list[EngineRequest]):
    """A list of requests that travels as plain tuples, which cost a fifth of objects to pack; it arrives as a list."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        kinds: dict[tuple[Any, ...], int] = {}  # most rows have the same parameters
        shared: list[tuple[Any, ...]] = []
        rows: list[tuple[int, tuple[Any, ...]]] = []
        for request in self:
            fields = _SHARED_FIELDS(request)
            kind = kinds.setdefault((id(fields[0]), *fields[1:]), len(shared))
            if kind == len(shared):
                shared.append(fields)
            rows.append((kind, _OWN_FIELDS(request)))
        return _unpack_requests, (shared, rows)


_SHARED_FIELDS = attrgetter("params", "stop_ids", "eos_ids", "bad_words")
_OWN_FIELDS = attrgetter(
    "number", "prompt_token_ids", "stream", "priority", "cache_salt", "arrival_time", "num_solo_deaths"
)


def _unpack_requests(kinds: list[tuple[Any, ...]], rows: list[tuple[int, tuple[Any, ...]]]) -> list[EngineRequest]:
    found = []
    for kind, (number, ids, *rest) in rows:
        found.append(EngineRequest(number, ids, *kinds[kind], *rest))
    return found


_RESULT_FIELDS = attrgetter(
    "number", "token_ids", "finish_reason", "stop_reason", "stop_text", "error", "error_code", "num_cached_tokens",
    "logprobs", "prompt_logprobs",
)  # fmt: skip
_STATS_FIELDS = attrgetter(*RequestStateStats.__slots__)


def pack_results(results: list[FinishedRequest]) -> list[tuple[Any, ...]]:
    """Results as plain tuples: objects take eight times as long to pack, and the driver packs one for every row."""
    return [(*_RESULT_FIELDS(one), None if one.metrics is None else _STATS_FIELDS(one.metrics)) for one in results]


def unpack_results(rows: list[tuple[Any, ...]]) -> list[FinishedRequest]:
    """What was packed."""
    found = []
    for row in rows:
        result = FinishedRequest(*row)
        result.metrics = None if row[-1] is None else RequestStateStats(*row[-1])
        found.append(result)
    return found


class RequestStatus(enum.Enum):
    """Where a request stands with the scheduler."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Request:
    """A request inside the scheduler."""

    source: EngineRequest
    token_ids: list[int]  # prompt and confirmed output
    num_prompt_tokens: int
    max_total_tokens: int  # prompt + max_tokens, at most max_model_len
    stop_set: frozenset[int] = frozenset()  # source.stop_ids
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0  # KV exists or is on its way by plans in flight
    num_inflight_tokens: int = 0  # sampled by plans in flight, ids not known here yet
    num_plans_inflight: int = 0
    num_cached_tokens: int = 0  # prefix hit when first admitted
    row: int = -1  # place in the workers' batch while RUNNING
    lane: int = 0  # which of the scheduler's lanes it runs in while RUNNING
    block_table: list[int] = field(default_factory=list)
    num_granted_blocks: int = 0  # leading blocks of the table that the ranks know of
    num_hashed_blocks: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    trust: Trust = Trust.FREE
    trusted_from: int = 0  # tokens at which it is past the place where the ranks died
    num_company_deaths: int = 0
    num_solo_deaths: int = 0
    finish_reason: str | None = None
    error_code: str | None = None
    stop_reason: int | str | None = None
    stop_text: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position of the first predicted token
    stats: RequestStateStats = field(default_factory=RequestStateStats)

    @classmethod
    def begin(cls, source: EngineRequest, max_model_len: int) -> Request:
        """A request as it comes in."""
        prompt, max_tokens = source.prompt_token_ids, source.params.max_tokens
        assert prompt
        assert max_tokens is not None
        return cls(
            source,
            list(prompt),
            len(prompt),
            min(len(prompt) + max_tokens, max_model_len),
            frozenset(source.stop_ids),
            num_solo_deaths=source.num_solo_deaths,
            stats=RequestStateStats(arrival_time=source.arrival_time, queued_ts=time.time()),
        )

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and confirmed output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Confirmed output."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        """True once it has its finish_reason; its blocks may still be held by plans in flight."""
        return self.finish_reason is not None


def finished_request(request: Request) -> FinishedRequest:
    """What the client gets of a request."""
    failed = request.finish_reason == "error"
    prompt_parts = [request.prompt_logprobs[start] for start in sorted(request.prompt_logprobs)]
    return FinishedRequest(
        number=request.source.number,
        token_ids=request.token_ids[request.num_prompt_tokens :],
        finish_reason=request.finish_reason or "error",
        stop_reason=request.stop_reason,
        stop_text=None if failed else request.stop_text,
        error=request.stop_text if failed else None,
        error_code=request.error_code,
        num_cached_tokens=request.num_cached_tokens,
        logprobs=concat_logprobs(request.logprobs) if request.logprobs else None,
        prompt_logprobs=concat_logprobs(prompt_parts) if prompt_parts else None,
        metrics=request.stats,
    )
