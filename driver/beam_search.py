"""Beam search: each step asks the engine for one token, with its best alternatives, of every live beam."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.driver.detokenize import TextDecoder
from shoal.driver.feed import Feed, RequestBatch
from shoal.driver.inputs import Prompt
from shoal.driver.outputs import BeamSearchOutput, BeamSearchSequence, Logprob, logprob_dicts
from shoal.driver.params import BeamSearchParams, SamplingParams
from shoal.driver.progress import Progress
from shoal.driver.request import EngineRequest
from shoal.driver.rows import RowTools


@dataclass(slots=True)
class _Beam:
    tokens: list[int]  # prompt and output
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cum_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass(slots=True)
class _Search:
    prompt: Prompt
    token_ids: list[int]
    live: list[_Beam]
    completed: list[_Beam] = field(default_factory=list)


class BeamSearcher:
    """Searches many prompts together, a group at a time."""

    def __init__(self, feed: Feed, tools: RowTools, params: BeamSearchParams, take_number: Callable[[], int]) -> None:
        """`take_number` gives a fresh EngineRequest number."""
        self._feed, self._tools, self._params = feed, tools, params
        self._take_number = take_number
        self._eos = None if params.ignore_eos else tools.binder.eos_token_id
        self._step = SamplingParams(
            max_tokens=1,
            temperature=params.temperature,
            logprobs=min(2 * params.beam_width, tools.inputs.vocab_size),
            detokenize=False,
        )

    def run(
        self, prompts: Sequence[tuple[Prompt, list[int]]], group: int, progress: Progress
    ) -> list[BeamSearchOutput]:
        """The best sequences of each tokenized prompt; at most `group` prompts are searched at once."""
        outputs: list[BeamSearchOutput] = []
        for start in range(0, len(prompts), group):
            searches = [_Search(prompt, ids, [_Beam(list(ids))]) for prompt, ids in prompts[start : start + group]]
            for _ in range(self._params.max_tokens):
                if not self._extend(searches):
                    break
            outputs += [self._output(search) for search in searches]
            progress.advance(len(searches))
        return outputs

    def _extend(self, searches: list[_Search]) -> bool:
        """One token further, in every search that can go on; False when none could."""
        asked: list[tuple[_Search, list[EngineRequest]]] = []
        for search in searches:
            if search.live and len(search.live[0].tokens) < self._tools.inputs.max_model_len:
                asked.append((search, [self._request(search, beam) for beam in search.live]))
        if not asked:
            return False
        batch = RequestBatch([request for _, requests in asked for request in requests])
        with Progress(False, 0) as silent:
            self._feed.run([batch], silent)
        for search, requests in asked:
            grown: list[_Beam] = []
            for beam, request in zip(search.live, requests, strict=True):
                found = batch.results[request.number].logprobs
                assert found is not None
                (candidates,) = logprob_dicts(found, self._step.logprobs or 0, self._tools.decoder)
                for token, logprob in candidates.items():
                    self._grow(search, grown, beam, token, logprob.logprob, candidates)
            grown.sort(key=self._score, reverse=True)
            search.live = grown[: self._params.beam_width]
        return True

    def _request(self, search: _Search, beam: _Beam) -> EngineRequest:
        number = self._take_number()
        return EngineRequest(
            number=number,
            prompt_token_ids=beam.tokens,
            params=self._step,
            stream=self._tools.binder.stream(number, 0, None),
            cache_salt=search.prompt.cache_salt,
            arrival_time=time.time(),
        )

    def _grow(
        self,
        search: _Search,
        grown: list[_Beam],
        beam: _Beam,
        token: int,
        logprob: float,
        candidates: dict[int, Logprob],
    ) -> None:
        logprobs, total = [*beam.logprobs, candidates], beam.cum_logprob + logprob
        if token == self._eos:
            tokens = [*beam.tokens, token] if self._params.include_stop_str_in_output else beam.tokens
            search.completed.append(_Beam(tokens, logprobs, total, "stop", token))
        else:
            grown.append(_Beam([*beam.tokens, token], logprobs, total))

    def _score(self, beam: _Beam) -> float:
        length = len(beam.tokens)
        if beam.tokens[-1] == self._tools.binder.eos_token_id:
            length -= 1
        return beam.cum_logprob / float(max(length, 1) ** self._params.length_penalty)

    def _output(self, search: _Search) -> BeamSearchOutput:
        for beam in search.live:
            beam.finish_reason = "length"
        best = sorted([*search.completed, *search.live], key=self._score, reverse=True)[: self._params.beam_width]
        origin: dict[str, object] = {"prompt_token_ids": search.token_ids}
        if search.prompt.text is not None:
            origin["prompt"] = search.prompt.text
        sequences = [
            BeamSearchSequence(
                orig_prompt=origin,
                tokens=beam.tokens,
                logprobs=beam.logprobs,
                cum_logprob=beam.cum_logprob,
                text=_text(self._tools.decoder, beam.tokens),
                finish_reason=beam.finish_reason,
                stop_reason=beam.stop_reason,
            )
            for beam in best
        ]
        return BeamSearchOutput(sequences)


def _text(decoder: TextDecoder | None, tokens: list[int]) -> str | None:
    return None if decoder is None else decoder.text([], tokens, skip_special_tokens=False)
