"""Sampling parameters against the model and the tokenizer, and the engine's requests made of rows."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.driver.params import SamplingParams
from shoal.driver.request import EngineRequest

_GENERATION_KEYS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Bound:
    """What a SamplingParams means for one model."""

    params: SamplingParams
    stop_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Row:
    """A prompt that is ready to run."""

    index: int  # among the prompts of its call
    request_number: int  # RequestOutput.request_id, and the key of its random streams
    first_sequence: int  # EngineRequest.number of child 0; child i has first_sequence + i
    prompt: str | None
    token_ids: list[int]
    bound: Bound
    priority: int = 0
    cache_salt: str | None = None


class Binder:
    """Checks parameters against one model and makes EngineRequests."""

    def __init__(
        self,
        *,
        vocab_size: int,
        max_model_len: int,
        max_logprobs: int,
        seed: int,
        tokenizer: Any,
        has_fast_tokenizer: bool,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """`eos_token_ids`: all that the model's configs name; the tokenizer's own one, else the first, is *the* EOS."""
        self._vocab_size, self._max_model_len, self._seed = vocab_size, max_model_len, seed
        self._max_logprobs = vocab_size if max_logprobs == -1 else max_logprobs
        self._tokenizer, self._has_fast = tokenizer, has_fast_tokenizer
        ids = list(dict.fromkeys(eos_token_ids))
        eos = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_id: int | None = eos if eos is not None else next(iter(ids), None)
        self._other_eos = tuple(token for token in ids if token != self.eos_token_id and 0 <= token < vocab_size)
        self._derived: dict[tuple[int, int | None, bool], tuple[SamplingParams, SamplingParams]] = {}

    def bind(self, params: SamplingParams) -> Bound:
        """Raises ValueError where `params` ask for what this model or tokenizer does not have."""
        self._check_ids(params)
        for name in ("logprobs", "prompt_logprobs"):
            self._check_logprobs(name, getattr(params, name))
        if params.stop and not self._has_fast:
            why = "skip_tokenizer_init=True" if self._tokenizer is None else "this tokenizer has no fast backend"
            raise ValueError(f"stop strings {params.stop} need a fast tokenizer, but {why}: use stop_token_ids")
        has_eos = not params.ignore_eos and self.eos_token_id is not None
        eos = (self.eos_token_id,) if has_eos and self.eos_token_id is not None else ()
        others = () if params.ignore_eos else self._other_eos
        stop_ids = tuple(dict.fromkeys([*eos, *others, *params.stop_token_ids]))
        return Bound(params, stop_ids, eos, self._bad_words(params.bad_words))

    def _check_ids(self, params: SamplingParams) -> None:
        groups: dict[str, Iterable[int]] = {
            "logit_bias": params.logit_bias or (),
            "allowed_token_ids": params.allowed_token_ids or (),
            "stop_token_ids": params.stop_token_ids,
        }
        for name, ids in groups.items():
            wrong = sorted({token for token in ids if not 0 <= token < self._vocab_size})
            if wrong:
                raise ValueError(
                    f"token_id(s) {wrong[:10]} in {name} contain out-of-vocab token ids. "
                    f"Vocabulary size: {self._vocab_size}"
                )

    def _check_logprobs(self, name: str, count: int | None) -> None:
        if count is None:
            return
        kind = "sample" if name == "logprobs" else "prompt"
        wanted = self._vocab_size if count == -1 else count
        if wanted > self._max_logprobs:
            raise ValueError(
                f"Requested {kind} logprobs of {wanted}, which is greater than max allowed: {self._max_logprobs} "
                "(engine argument max_logprobs)"
            )
        if wanted > self._vocab_size:
            raise ValueError(f"{name} must be at most the vocabulary size, {self._vocab_size}, got {count}.")

    def _bad_words(self, words: list[str]) -> tuple[tuple[int, ...], ...]:
        """Ids of each word, as it begins a text and as it follows a space."""
        if words and self._tokenizer is None:
            raise ValueError(f"bad_words {words} need a tokenizer, but skip_tokenizer_init=True")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
                wrong = [token for token in ids if not 0 <= token < self._vocab_size]
                if wrong:
                    raise ValueError(
                        f"The model vocabulary size is {self._vocab_size}, but the following tokens were specified as "
                        f"bad: {wrong} (of {word!r}). All token id values should be integers satisfying: "
                        f"0 <= token_id < {self._vocab_size}."
                    )
                if ids:
                    found[ids] = None
        return tuple(found)

    def requests(self, row: Row, first_child: int, count: int) -> list[EngineRequest]:
        """EngineRequests of `count` of the row's children. ValueError where min_tokens cannot be reached."""
        now = time.time()
        return [self._request(row, child, now) for child in range(first_child, first_child + count)]

    def stream(self, row_key: int, sample: int, seed: int | None) -> int:
        """Key of a sequence's random stream."""
        return stream_key(self._seed, row_key, sample, seed)

    def room(self, row: Row) -> int:
        """Tokens that each of the row's sequences may get."""
        room = self._max_model_len - len(row.token_ids)
        asked = row.bound.params.max_tokens
        return room if asked is None else min(asked, room)

    def check_length(self, row: Row) -> None:
        """Raises ValueError where `max_tokens=None` leaves less than min_tokens."""
        params, room = row.bound.params, self._max_model_len - len(row.token_ids)
        if params.max_tokens is None and params.min_tokens > room:
            raise ValueError(
                f"min_tokens must be less than or equal to max_tokens={room} (max_model_len {self._max_model_len} less "
                f"the prompt's {len(row.token_ids)}), got {params.min_tokens}."
            )

    def _request(self, row: Row, child: int, now: float) -> EngineRequest:
        bound = row.bound
        return EngineRequest(
            number=row.first_sequence + child,
            prompt_token_ids=row.token_ids,
            params=self._filled(bound.params, len(row.token_ids), child),
            stop_ids=bound.stop_ids,
            eos_ids=bound.eos_ids,
            bad_words=bound.bad_words,
            stream=self.stream(row.request_number, child, bound.params.seed),
            priority=row.priority,
            cache_salt=row.cache_salt,
            arrival_time=now,
        )

    def _filled(self, params: SamplingParams, prompt_len: int, child: int) -> SamplingParams:
        """`params` with max_tokens set, and prompt logprobs only for child 0: all children would find the same."""
        room = self._max_model_len - prompt_len if params.max_tokens is None else None
        drop = child > 0 and params.prompt_logprobs is not None
        if room is None and not drop:
            return params
        key = (id(params), room, drop)
        known = self._derived.get(key)
        if known is None:
            if len(self._derived) > 4096:
                self._derived.clear()
            changes: dict[str, Any] = {"prompt_logprobs": None} if drop else {}
            if room is not None:
                changes["max_tokens"] = room
            known = self._derived[key] = (params, params.replace(**changes))  # holds params, so its id stays its own
        return known[1]


def stream_key(engine_seed: int, row_key: int, sample: int, seed: int | None) -> int:
    """Key of a sequence's random stream, unsigned 64 bits: the same in every process and every run."""
    if seed is not None:
        return (seed + sample) & _MASK
    data = struct.pack("<QQQ", engine_seed & _MASK, row_key & _MASK, sample)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def default_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams() with what the model's generation_config says in place of the defaults."""
    found = {ours: generation_config.get(theirs) for theirs, ours in _GENERATION_KEYS.items()}
    return SamplingParams(**{name: value for name, value in found.items() if value is not None})
