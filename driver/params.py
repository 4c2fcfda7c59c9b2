"""SamplingParams and BeamSearchParams: what a user may ask of a row, checked when they are made.

Torch-free and light: the driver actor unpickles these.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Self

GREEDY_EPS = 1e-5  # temperatures below mean greedy
MIN_TEMPERATURE = 0.01  # positive ones below are raised to it: logits / t overflows
MAX_ALLOWED_TOKEN_IDS = 1024
_ABSENT: dict[str, tuple[str, str]] = {  # name: what is not supported, what to do instead
    "structured_outputs": ("structured output", ""),
    "guided_decoding": ("structured output", ""),
    "logprob_token_ids": ("logprobs of chosen ids", ""),
    "flat_logprobs": ("a flat form of logprobs", ""),
    "thinking_token_budget": ("a thinking budget", ""),
    "repetition_detection": ("stopping on repetition", ""),
    "output_kind": ("choosing the kind of output", "; finished outputs are what is returned"),
    "best_of": ("picking the best of several samples", ""),
    "logits_processors": ("a logits processor per request", "; give classes to LLM(logits_processors=[...])"),
    "truncate_prompt_tokens": ("truncation here", "; give tokenization_kwargs={'truncate_prompt_tokens': k}"),
}


class ArgumentTypeError(TypeError, ValueError):
    """A value of the wrong type: TypeError as Python has it, ValueError as every other refusal of a parameter."""


class _Checked:
    """Names a wrong keyword, and the nearest right one, before the dataclass's own `__init__` sees it."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        known = [name for name in cls.__init__.__annotations__ if name != "return"]
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{cls.__name__} got an unexpected keyword argument {name!r}{hint}")
        return super().__new__(cls)


@dataclass(frozen=True, slots=True)
class SamplingParams(_Checked):
    """How one prompt is continued. Field by field as in vLLM; immutable; `replace()` makes a changed copy.

    Raises ValueError (naming field, value and limit); for a wrong type, an error that is TypeError and ValueError both.
    """

    n: int = 1
    """Sequences to return for the prompt."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each id that the output already has, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """The same, once for each occurrence."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of ids in prompt or output, > 0."""
    temperature: float = 1.0
    """In [0, 2]; below 1e-5: greedy."""
    top_p: float = 1.0
    """Keep the smallest set of ids whose probability reaches this, in (0, 1]."""
    top_k: int = 0
    """Keep the k best ids; 0 or -1: all."""
    min_p: float = 0.0
    """Keep ids at least this probable relative to the best one, in [0, 1]."""
    seed: int | None = None
    """Same prompt and seed: same tokens. Child i of n uses seed + i. -1 means None."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the output; one string is a list of one."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Ids that end the output, `ignore_eos` or not."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence ids."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: as many as max_model_len leaves."""
    min_tokens: int = 0
    """No end by any stop id or string before so many tokens."""
    logprobs: int | None = None
    """Log-probabilities of the sampled token and the k best; 0: the sampled one; -1: the whole vocabulary."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    detokenize: bool = True
    """False: text stays empty."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Keep the spaces that a decoder puts between special tokens."""
    include_stop_str_in_output: bool = False
    """Keep what ended the output (stop string, stop token) in the text."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these ids."""
    allowed_token_ids: list[int] | None = None
    """Only these ids may be sampled; at most 1024."""
    bad_words: list[str] = field(default_factory=list)
    """Texts whose tokens are never completed."""
    extra_args: dict[str, Any] | None = None
    """For custom logits processors."""
    skip_reading_prefix_cache: bool | None = None
    """Compute the whole prompt. None: when prompt_logprobs are asked for, which need it."""
    structured_outputs: InitVar[None] = None
    guided_decoding: InitVar[None] = None
    logprob_token_ids: InitVar[None] = None
    flat_logprobs: InitVar[bool | None] = None
    thinking_token_budget: InitVar[None] = None
    repetition_detection: InitVar[None] = None
    output_kind: InitVar[None] = None
    best_of: InitVar[None] = None
    logits_processors: InitVar[None] = None
    truncate_prompt_tokens: InitVar[None] = None

    def __post_init__(self, *absent: object) -> None:
        for name, value in zip(_ABSENT_IN_ORDER, absent, strict=True):
            if value is not None and value is not False:
                what, instead = _ABSENT[name]
                raise ValueError(f"{name}={_short(value)}: {what} is not supported by this version of Shoal{instead}")
        self._check_numbers()
        self._check_counts()
        self._check_lists()
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(f"{name} must be a bool, but is of type {_type(getattr(self, name))}")
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop strings are only supported when detokenize is True, got stop={_short(self.stop)}. "
                "Set detokenize=True to use stop."
            )
        if self.skip_reading_prefix_cache is None:
            self._set("skip_reading_prefix_cache", self.prompt_logprobs is not None)
        elif not isinstance(self.skip_reading_prefix_cache, bool):
            raise ArgumentTypeError(
                f"skip_reading_prefix_cache must be a bool or None, got {_short(self.skip_reading_prefix_cache)}"
            )
        if self.temperature < GREEDY_EPS:
            if self.n > 1:
                raise ValueError(
                    f"n must be 1 when using greedy sampling, got {self.n} (temperature {self.temperature})."
                )
            for name, value in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= self._float(name) <= 2:
                raise ValueError(f"{name} must be in [-2, 2], got {getattr(self, name)}.")
        for name in ("repetition_penalty", "temperature"):
            if not math.isfinite(self._float(name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be greater than zero, got {self.repetition_penalty}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be non-negative, got {self.temperature}.")
        if self.temperature > 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if GREEDY_EPS <= self.temperature < MIN_TEMPERATURE:
            warnings.warn(
                f"temperature {self.temperature} is below {MIN_TEMPERATURE}, where logits overflow; "
                f"{MIN_TEMPERATURE} is used",
                stacklevel=5,
            )
            self._set("temperature", MIN_TEMPERATURE)
        if not 0 < self._float("top_p") <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if not 0 <= self._float("min_p") <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}.")

    def _check_counts(self) -> None:
        limit = _max_n()
        if self._int("n") < 1:
            raise ValueError(f"n must be at least 1, got {self.n}.")
        if self.n > limit:
            raise ValueError(
                f"n must be at most {limit}, got {self.n}. To increase this limit, set the VLLM_MAX_N_SEQUENCES "
                "environment variable."
            )
        if self._int("top_k") < -1:
            raise ValueError(f"top_k must be 0 (disable), or at least 1, got {self.top_k}.")
        if self.top_k == -1:
            self._set("top_k", 0)
        if self.seed is not None and self._int("seed") == -1:
            self._set("seed", None)
        if self.max_tokens is not None and self._int("max_tokens") < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self._int("min_tokens") < 0:
            raise ValueError(f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}."
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                self._set(name, 1 if value else None)
            elif value is not None and self._int(name) < -1:
                raise ValueError(f"{name} must be non-negative or -1, got {value}.")

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            texts = _texts(name, getattr(self, name))
            if "" in texts:
                raise ValueError(f"{name} cannot contain an empty string. Got {name}={_short(texts)}")
            self._set(name, texts)
        self._set("stop_token_ids", _ids("stop_token_ids", () if self.stop_token_ids is None else self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError("allowed_token_ids is not None and empty!")
            if len(allowed) > MAX_ALLOWED_TOKEN_IDS:
                raise ValueError(f"allowed_token_ids may have at most {MAX_ALLOWED_TOKEN_IDS} ids, got {len(allowed)}.")
            self._set("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            self._set("logit_bias", _bias(self.logit_bias))
        if self.extra_args is not None and not isinstance(self.extra_args, dict):
            raise ArgumentTypeError(f"extra_args must be a dict or None, but is of type {_type(self.extra_args)}")

    def _float(self, name: str) -> float:
        value = _to_float(name, getattr(self, name))
        self._set(name, value)
        return value

    def _int(self, name: str) -> int:
        value = _to_int(name, getattr(self, name))
        self._set(name, value)
        return value

    @classmethod
    def from_optional(cls, **arguments: Any) -> SamplingParams:
        """SamplingParams where None means the default, and `logit_bias` may have keys of text and any size of values.

        `max_tokens=None` and fields whose default is None keep their None.
        """
        bias = arguments.get("logit_bias")
        if isinstance(bias, Mapping):  # else the constructor says that it is none
            arguments["logit_bias"] = {int(key): min(100.0, max(-100.0, float(value))) for key, value in bias.items()}
        return cls(**{name: v for name, v in arguments.items() if v is not None or name == "max_tokens"})

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.skip_reading_prefix_cache == (self.prompt_logprobs is not None):
            fields["skip_reading_prefix_cache"] = None  # it follows prompt_logprobs, the new one too
        return type(self)(**{**fields, **changes})

    def clone(self) -> SamplingParams:
        """A copy whose lists and dicts are its own."""
        return self.replace()


_BOOLS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
# __post_init__ gets the InitVars in this order
_ABSENT_IN_ORDER = tuple(name for name in SamplingParams.__init__.__annotations__ if name in _ABSENT)


def check_shared(values: Mapping[str, Any]) -> SamplingParams:
    """The parameters of all rows of a job. ValueError where they are wrong by themselves, in a row's words.

    What a row or the model may add is not held against them: min_tokens alone may be above the default of max_tokens.
    """
    try:
        given = json.loads(json.dumps(dict(values)))
        return SamplingParams.from_optional(**{"max_tokens": None, **given})
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True, slots=True)
class BeamSearchParams(_Checked):
    """How `LLM.beam_search` searches."""

    beam_width: int
    """Beams kept at each step, and sequences returned."""
    max_tokens: int
    """Steps."""
    ignore_eos: bool = False
    """Treat end-of-sequence as any other token."""
    temperature: float = 0.0
    """Of the one-token requests; the log-probabilities that rank beams are taken before it."""
    length_penalty: float = 1.0
    """Beams rank by cumulative log-probability / length ** length_penalty."""
    include_stop_str_in_output: bool = False
    """Keep the end-of-sequence token in `tokens`."""
    structured_outputs: InitVar[None] = None

    def __post_init__(self, structured_outputs: None) -> None:
        if structured_outputs is not None:
            raise ValueError("structured_outputs: structured output is not supported by this version of Shoal")
        for name in ("beam_width", "max_tokens"):
            value = _to_int(name, getattr(self, name))
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
            object.__setattr__(self, name, value)
        for name in ("temperature", "length_penalty"):
            number = _to_float(name, getattr(self, name))
            if not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {number}.")
            object.__setattr__(self, name, number)
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(f"{name} must be a bool, but is of type {_type(getattr(self, name))}")


def _max_n() -> int:
    for name in ("SHOAL_MAX_N_SEQUENCES", "VLLM_MAX_N_SEQUENCES"):
        text = os.environ.get(name)
        if text is not None:
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"{name} must be a positive integer, got {text!r}")
            return int(text)
    return 16384


def _to_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(f"{name} must be an integer (an int), but is of type {_type(value)}")
    return operator.index(value)


def _to_float(name: str, value: object) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise ArgumentTypeError(f"{name} must be a number, but is of type {_type(value)}")
    return float(value)


def _texts(name: str, value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else _items(name, value, "strings")
    for text in texts:
        if not isinstance(text, str):
            raise ArgumentTypeError(f"{name} must contain only strings, got {_short(text)}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} has a string with a lone surrogate, at character {error.start}") from None
    return texts


def _ids(name: str, value: Any) -> list[int]:
    ids = []
    for item in _items(name, value, "integers"):
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise ArgumentTypeError(f"{name} must contain only integers, got {_short(item)}.")
        ids.append(operator.index(item))
    return ids


def _items(name: str, value: Any, what: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ArgumentTypeError(f"{name} must be a list of {what}, but is of type {_type(value)}")
    return list(value)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(f"logit_bias must be a dict of token id to number, but is of type {_type(value)}")
    bias = {
        _to_int("every key of logit_bias", key): _to_float("every value of logit_bias", v) for key, v in value.items()
    }
    for token, number in bias.items():
        if math.isnan(number) or number == math.inf:
            raise ValueError(f"logit_bias must have finite values (or -inf), got {number} for token id {token}.")
    return bias


def _type(value: object) -> str:
    return type(value).__name__


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
