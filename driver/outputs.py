"""What users get back: RequestOutput and friends, and how the driver's results become them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shoal.driver.detokenize import TextDecoder
from shoal.driver.params import SamplingParams
from shoal.driver.request import FinishedRequest, RequestStateStats
from shoal.workers.plan import TokenLogprobs


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int | None = None
    """1 is the most likely."""
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    """Which of the n."""
    text: str
    token_ids: Sequence[int]
    """All sampled tokens, the one that ended it too."""
    cumulative_logprob: float | None = None
    """Sum over the sampled tokens; None unless logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """A dict for each token: the sampled one first, then the k best that are not it."""
    finish_reason: str | None = None
    """"stop", "length" or "abort"."""
    stop_reason: int | str | None = None
    """The stop id or stop string that ended it; None for end-of-sequence."""

    def finished(self) -> bool:
        """True once it has a finish_reason."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt."""

    request_id: str
    prompt: str | None
    """Its text; None where token ids were given."""
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """A dict for each prompt token, None for the first."""
    outputs: list[CompletionOutput] = field(default_factory=list)
    """n of them, by index; none when `error` is set."""
    finished: bool = True
    metrics: RequestStateStats | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens whose KV was found in the prefix cache."""
    error: str | None = None
    """Why this prompt has no outputs (only with on_error="return")."""


@dataclass(slots=True)
class BeamSearchSequence:
    """One sequence that beam search found."""

    orig_prompt: dict[str, object]
    """The prompt in its inner form: prompt_token_ids, and prompt where text was given."""
    tokens: list[int]
    """Prompt and output."""
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    """Of all tokens, the prompt's too."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best sequences of one prompt, best first."""

    sequences: list[BeamSearchSequence]


def error_output(request_id: str, prompt: str | None, token_ids: list[int] | None, error: str) -> RequestOutput:
    """The output of a row that has none."""
    return RequestOutput(request_id=request_id, prompt=prompt, prompt_token_ids=token_ids, error=error)


def make_output(
    request_id: str,
    prompt: str | None,
    token_ids: list[int],
    params: SamplingParams,
    children: Sequence[FinishedRequest],
    decoder: TextDecoder | None,
    log_stats: bool,
) -> RequestOutput:
    """Joins a row's children, given in order of their index, into its RequestOutput; any child's error is the row's."""
    for child in children:
        if child.finish_reason == "error":
            return error_output(request_id, prompt, token_ids, child.error or "the request failed without a message")
    decoder = decoder if params.detokenize else None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    if params.prompt_logprobs is not None:
        prompt_logprobs = [None, *logprob_dicts(children[0].prompt_logprobs, params.prompt_logprobs, decoder)]
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=token_ids,
        prompt_logprobs=prompt_logprobs,
        outputs=[make_completion(index, token_ids, params, child, decoder) for index, child in enumerate(children)],
        metrics=_join_stats([child.metrics for child in children if child.metrics is not None]) if log_stats else None,
        num_cached_tokens=children[0].num_cached_tokens,
    )


def make_completion(
    index: int,
    prompt_token_ids: list[int],
    params: SamplingParams,
    result: FinishedRequest,
    decoder: TextDecoder | None,
) -> CompletionOutput:
    """One child's CompletionOutput. `decoder` None: no text."""
    text = "" if decoder is None else _text(prompt_token_ids, params, result, decoder)
    output = CompletionOutput(
        index=index,
        text=text,
        token_ids=result.token_ids,
        finish_reason=result.finish_reason,
        stop_reason=result.stop_reason,
    )
    if params.logprobs is not None:
        output.logprobs = logprob_dicts(result.logprobs, params.logprobs, decoder)
        entries = result.logprobs
        output.cumulative_logprob = 0.0 if entries is None else float(entries.logprobs[:, 0].sum(dtype="float64"))
    return output


def _text(prompt_token_ids: list[int], params: SamplingParams, result: FinishedRequest, decoder: TextDecoder) -> str:
    if result.stop_text is not None:
        return result.stop_text
    shown = result.token_ids
    if result.finish_reason == "stop" and not params.include_stop_str_in_output:
        shown = shown[:-1]  # what ended the row is a token id here, EOS or a stop id
    return decoder.text(prompt_token_ids, shown, params.skip_special_tokens, params.spaces_between_special_tokens)


def logprob_dicts(entries: TokenLogprobs | None, count: int, decoder: TextDecoder | None) -> list[dict[int, Logprob]]:
    """A dict for each token: itself first, then the `count` best (-1: all), those it is among left out."""
    if entries is None:
        return []
    width = entries.ids.shape[1] if count == -1 else count + 1
    rows = zip(
        entries.ids[:, :width].tolist(), entries.logprobs[:, :width].tolist(), entries.ranks.tolist(), strict=True
    )
    return [_dict(ids, logprobs, rank, decoder) for ids, logprobs, rank in rows]


def _dict(ids: list[int], logprobs: list[float], rank: int, decoder: TextDecoder | None) -> dict[int, Logprob]:
    sampled = ids[0]
    result = {sampled: Logprob(logprobs[0], rank, _token_text(sampled, decoder))}
    for place in range(1, len(ids)):
        token = ids[place]
        if token >= 0 and token != sampled:  # -1 pads rows of a batch that asked for fewer
            result[token] = Logprob(logprobs[place], place, _token_text(token, decoder))
    return result


def _token_text(token: int, decoder: TextDecoder | None) -> str | None:
    return None if decoder is None else decoder.token_text(token)


def _join_stats(stats: Iterable[RequestStateStats]) -> RequestStateStats | None:
    """The stats of a row from those of its children: first of the starts, last of the ends."""
    children = list(stats)
    if len(children) <= 1:
        return children[0] if children else None
    return RequestStateStats(
        num_generation_tokens=sum(child.num_generation_tokens for child in children),
        arrival_time=min(child.arrival_time for child in children),
        queued_ts=min(child.queued_ts for child in children),
        scheduled_ts=min(child.scheduled_ts for child in children),
        first_token_ts=min(child.first_token_ts for child in children),
        last_token_ts=max(child.last_token_ts for child in children),
        num_preemptions=sum(child.num_preemptions for child in children),
    )
