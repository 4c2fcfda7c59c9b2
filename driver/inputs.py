"""Prompt forms to token ids: what a user may pass as a prompt, and the checks a row must pass before it is sent."""

from __future__ import annotations

import json
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

CHUNK_TEXTS = 256  # texts a tokenizer call takes
CHUNK_CHARS = 1 << 20  # or about this many characters, whichever comes first

# Steps before the model that never lose more than a known share of the characters; others may lose any number.
_COMPOSING = {"NFC": 4, "NFKC": 4}
_HARMLESS = {"NFD": 1, "NFKD": 1, "Prepend": 1}
_SPLITTERS = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"}
_REFUSED = {
    "prompt_embeds": "prompt embeddings are",
    "multi_modal_data": "multimodal input is",
    "multi_modal_uuids": "multimodal input is",
    "mm_processor_kwargs": "multimodal input is",
    "token_type_ids": "token types are",
    "data": "IO-processor plugins are",
}


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids; `prompt` is its text, if known, for RequestOutput.prompt."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType = str | Sequence[int] | TextPrompt | TokensPrompt


@dataclass(slots=True)
class Prompt:
    """A prompt in its one inner form: `token_ids`, else `text` to be tokenized."""

    text: str | None
    token_ids: list[int] | None = None
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """What `tokenization_kwargs` said."""

    add_special_tokens: bool = True
    truncate_to: int | None = None  # tokens
    keep_left: bool = False  # which end a truncated prompt keeps
    lower: bool = False


def split_prompts(prompts: Any) -> Sequence[Any]:
    """The prompts one by one, unparsed: one str, one dict or one list of ids is one prompt; arrays become lists."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if hasattr(prompts, "tolist") and hasattr(prompts, "ndim"):
        prompts = prompts.tolist()
    if isinstance(prompts, (bytes, numbers.Number)) or not hasattr(prompts, "__iter__"):
        raise TypeError(f"Prompt should be a string, list of tokens, or dictionary, got {type(prompts).__name__}")
    if not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
        prompts = list(prompts)
    if len(prompts) and isinstance(prompts[0], numbers.Number):
        return [prompts]
    return cast("Sequence[Any]", prompts)


def check_form(raw: Any) -> None:
    """Raises TypeError or ValueError for what can be seen of a wrong prompt without looking at every token."""
    if isinstance(raw, str):
        return
    if isinstance(raw, Mapping):
        _check_keys(raw)
    elif isinstance(raw, (bytes, numbers.Number)) or not hasattr(raw, "__getitem__") or not hasattr(raw, "__len__"):
        raise TypeError(f"Prompt should be a string, list of tokens, or dictionary, got {type(raw).__name__}")
    elif not len(raw):
        raise ValueError("The decoder prompt cannot be empty")


def parse_prompt(raw: Any) -> Prompt:
    """The inner form of one prompt. TypeError for a wrong kind, ValueError for what is refused or cannot be text."""
    check_form(raw)
    if isinstance(raw, str):
        return Prompt(_text(raw))
    if not isinstance(raw, Mapping):
        return Prompt(None, _token_ids(raw))
    text = raw.get("prompt")
    salt = raw.get("cache_salt")
    if raw.get("prompt_token_ids") is not None:
        return Prompt(text, _token_ids(raw["prompt_token_ids"]), salt)
    return Prompt(_text(cast("str", text)), None, salt)


def _check_keys(raw: Mapping[str, Any]) -> None:
    if raw.get("encoder_prompt") is not None or raw.get("decoder_prompt") is not None:
        raise TypeError("Cannot pass encoder-decoder prompt to decoder-only models")
    for name, what in _REFUSED.items():
        value = raw.get(name)
        if value is not None and not (isinstance(value, Mapping) and not value):
            raise ValueError(f"{name}: {what} not supported by this version of Shoal")
    text, ids, salt = raw.get("prompt"), raw.get("prompt_token_ids"), raw.get("cache_salt")
    if text is None and ids is None:
        keys = ", ".join(map(repr, raw)) or "none"
        raise TypeError(
            "Prompt dictionary must contain text, tokens, or embeddings ('prompt' or 'prompt_token_ids'), "
            f"got keys: {keys}"
        )
    if text is not None and not isinstance(text, str):
        raise TypeError(f"Prompt text should be a string, got {type(text).__name__}")
    if ids is not None and (isinstance(ids, (str, bytes, numbers.Number)) or not hasattr(ids, "__len__")):
        raise TypeError(f"Token prompt should be a list of integers, got {type(ids).__name__}")
    if ids is not None and not len(ids):
        raise ValueError("The decoder prompt cannot be empty")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise ValueError(f"cache_salt must be a non-empty string, got {salt!r}")


def _text(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Prompt text has a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start}: "
                "it is not valid Unicode and cannot be tokenized"
            ) from None
    return text


def _token_ids(value: Any) -> list[int]:
    ids = list(value.tolist() if hasattr(value, "tolist") else value)
    if set(map(type, ids)) != {int}:
        for position, item in enumerate(ids):
            if isinstance(item, bool) or not isinstance(item, numbers.Integral):
                raise TypeError(f"Token prompt should be a list of integers, got {item!r} at position {position}")
        ids = [int(item) for item in ids]
    return ids


class InputProcessor:
    """Turns prompts into token ids that fit the model."""

    def __init__(self, tokenizer: Any, tokenizer_json: str | None, vocab_size: int, max_model_len: int) -> None:
        """`tokenizer`: a Hugging Face tokenizer or None; `tokenizer_json`: its fast backend, serialized, or None."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._json = tokenizer_json
        self._most_chars: tuple[int | None, bool] | None = None
        self._backend = None if tokenizer is None else _plain_backend(tokenizer)

    def options(self, kwargs: Mapping[str, Any] | None, add_special_tokens: bool = True) -> TokenizeOptions:
        """Options from `tokenization_kwargs`; unknown names are warned of and ignored, as in vLLM."""
        given = dict(kwargs or {})
        max_length = given.pop("max_length", None)
        truncate = given.pop("truncate_prompt_tokens", None)
        if given.pop("truncation", None) in (True, "longest_first", "only_first") and truncate is None:
            truncate = -1 if max_length is None else max_length
        side = given.pop("truncation_side", None) or "left"
        for name in ("padding", "pad_prompt_tokens"):
            if given.pop(name, None) not in (None, False, "do_not_pad"):
                raise ValueError(f"tokenization_kwargs[{name!r}]: a prompt to continue cannot be padded")
        special = given.pop("add_special_tokens", add_special_tokens)
        lower = given.pop("do_lower_case", False)
        if given:
            warnings.warn(f"unknown tokenization_kwargs are ignored: {', '.join(sorted(given))}", stacklevel=4)
        if side not in ("left", "right"):
            raise ValueError(f"truncation_side must be 'left' or 'right', got {side!r}")
        return TokenizeOptions(bool(special), self._truncate_to(truncate), side == "right", bool(lower))

    def _truncate_to(self, tokens: Any) -> int | None:
        if tokens is None:
            return None
        if isinstance(tokens, bool) or not isinstance(tokens, numbers.Integral):
            raise TypeError(f"truncate_prompt_tokens must be an integer, got {tokens!r}")
        count, limit = int(tokens), self.max_model_len
        if count == -1:
            return max(1, limit - 1)  # the longest prompt that leaves room for one token
        if count < 1:
            raise ValueError(f"truncate_prompt_tokens must be at least 1, or -1 for what fits, got {count}")
        if count > limit:
            raise ValueError(
                f"truncate_prompt_tokens={count} cannot be greater than max_model_len = {limit}. "
                "Please request a smaller truncation size."
            )
        return count

    def tokenize(self, prompts: Sequence[Prompt], options: TokenizeOptions) -> list[list[int] | Exception]:
        """Token ids of each prompt, or why it has none that the model can take. Texts go to the tokenizer together."""
        results: list[list[int] | Exception] = [[] for _ in prompts]
        texts: list[str] = []
        places: list[int] = []
        for place, prompt in enumerate(prompts):
            try:
                if prompt.token_ids is not None:
                    results[place] = self._check(_cut(prompt.token_ids, options))
                else:
                    assert prompt.text is not None
                    self._check_text(prompt.text, options)
                    texts.append(prompt.text.lower() if options.lower else prompt.text)
                    places.append(place)
            except ValueError as error:
                results[place] = error
        for place, ids in zip(places, self._encode(texts, options), strict=True):
            try:
                results[place] = ids if isinstance(ids, Exception) else self._check(ids)
            except ValueError as error:
                results[place] = error
        return results

    def _encode(self, texts: list[str], options: TokenizeOptions) -> list[list[int] | Exception]:
        found: list[list[int] | Exception] = []
        for start in range(0, len(texts), CHUNK_TEXTS):  # thousands at once need more memory than caches have
            found += self._encode_chunk(texts[start : start + CHUNK_TEXTS], options)
        return found

    def _encode_chunk(self, texts: list[str], options: TokenizeOptions) -> list[list[int] | Exception]:
        try:
            return list(self._call(texts, options))
        except Exception as error:  # a tokenizer may raise anything; then find out which text it is
            if len(texts) == 1:
                return [ValueError(f"The tokenizer failed on this prompt: {error}")]
            return [self._encode_chunk([text], options)[0] for text in texts]

    def _call(self, texts: list[str], options: TokenizeOptions) -> list[list[int]]:
        if options.truncate_to is None and self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = self.tokenizer.split_special_tokens
            found = self._backend.encode_batch_fast(texts, add_special_tokens=options.add_special_tokens)
            return [one.ids for one in found]
        arguments: dict[str, Any] = {"add_special_tokens": options.add_special_tokens}
        side = self.tokenizer.truncation_side
        if options.truncate_to is not None:
            arguments |= {"truncation": True, "max_length": options.truncate_to}
            self.tokenizer.truncation_side = "right" if options.keep_left else "left"
        try:
            encoded = self.tokenizer(texts, **arguments, verbose=False, return_attention_mask=False)
        finally:
            self.tokenizer.truncation_side = side
        return cast("list[list[int]]", encoded["input_ids"])

    def _check_text(self, text: str, options: TokenizeOptions) -> None:
        if self.tokenizer is None:
            raise ValueError("A text prompt needs a tokenizer, but skip_tokenizer_init=True: pass prompt_token_ids")
        if options.truncate_to is not None or len(text) <= self.max_model_len:
            return
        if self._most_chars is None:
            self._most_chars = most_chars_per_token(self._json)
        most, strips = self._most_chars
        if most is None:
            return
        chars = sum(map(len, text.split())) if strips else len(text)
        if chars > most * self.max_model_len:
            raise ValueError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{chars} characters (more than {most * self.max_model_len} characters, which is the upper bound for "
                f"{self.max_model_len} input tokens). Please reduce the length of the input prompt."
            )

    def _check(self, ids: list[int]) -> list[int]:
        self.check_length(ids)
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"Token id {token} is out of vocabulary: the model has ids 0 to {self.vocab_size - 1}")
        return ids

    def check_length(self, ids: list[int]) -> None:
        """Raises ValueError for a prompt that is empty, or leaves no room for a token."""
        length, limit = len(ids), self.max_model_len
        if not length:
            raise ValueError("The decoder prompt cannot be empty")
        if length > limit:
            raise ValueError(
                f"This model's maximum context length is {limit} tokens. However, your prompt contains {length} input "
                "tokens. Please reduce the length of the input prompt."
            )
        if length == limit:
            raise ValueError(
                f"The decoder prompt (length {length}) plus the number of requested output tokens (at least 1) is "
                f"longer than the maximum model length of {limit}. Make sure that `max_model_len` is no smaller than "
                "the number of text tokens (prompt + requested output tokens)."
            )


def _plain_backend(tokenizer: Any) -> Any:
    """The `tokenizers` object in it, where calling that is all its own call does; that takes half the time."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    kind = type(tokenizer)
    plain = isinstance(tokenizer, TokenizersBackend) and all(
        getattr(kind, name) is getattr(TokenizersBackend, name) for name in ("__call__", "_encode_plus")
    )
    return tokenizer.backend_tokenizer if plain else None


def most_chars_per_token(tokenizer_json: str | None) -> tuple[int | None, bool]:
    """The most characters one token can stand for (None: no bound is known), and whether spaces do not count.

    A bound exists for BPE over bytes or with byte fallback: nothing becomes an unknown token there. Normalizers that
    compose characters widen it; tokens that swallow the spaces beside them leave it to the other characters.
    """
    if tokenizer_json is None:
        return None, False
    data = json.loads(tokenizer_json)
    model, added = data["model"], data["added_tokens"]
    splitters = _flat(data["pre_tokenizer"])
    kinds = {step["type"] for step in splitters}
    over_bytes = bool(model.get("byte_fallback")) or "ByteLevel" in kinds
    drops = any(step.get("behavior") == "Removed" for step in splitters)
    if model.get("type") != "BPE" or not over_bytes or drops or not kinds <= _SPLITTERS:
        return None, False
    widen = 1
    for step in _flat(data["normalizer"]):
        if step["type"] == "Replace":
            if len(step["pattern"].get("String", "")) != 1 or not step["content"]:
                return None, False
            continue
        factor = _COMPOSING.get(step["type"], _HARMLESS.get(step["type"]))
        if factor is None:
            return None, False
        widen *= factor
    longest = max(map(len, [*model["vocab"], *(token["content"] for token in added)]))
    return widen * longest, any(token["lstrip"] or token["rstrip"] for token in added)


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [step] if inner is None else [part for item in inner for part in _flat(item)]


def _cut(ids: list[int], options: TokenizeOptions) -> list[int]:
    if options.truncate_to is None or len(ids) <= options.truncate_to:
        return ids
    return ids[: options.truncate_to] if options.keep_left else ids[-options.truncate_to :]
