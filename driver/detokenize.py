"""Token ids to text, in whole and token by token, and the search for stop strings. Needs only the `tokenizers` package.

Text of an output is what decoding prompt and output adds to decoding the prompt, so that tokenizers which mark a
word's start keep the first space. `Detokenizer.text` and `StopChecker` agree on it to the character.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from tokenizers import Tokenizer

UNFINISHED = "�"  # what the decoders put where bytes are not, or not yet, a character
MAX_CONTEXT = 24  # prompt tokens looked at for a clean start
MAX_PENDING = 16  # tokens that may wait for their character; more are garbage and come out as they are


class TextDecoder(Protocol):
    """What turns ids to text on the client's side."""

    def text(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of an output."""

    def token_text(self, token_id: int) -> str:
        """Text of one token."""


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Detokenizer:
    """Decodes with a serialized fast tokenizer (`backend_tokenizer.to_str()`)."""

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer: Any = Tokenizer.from_str(tokenizer_json)
        decoder = json.loads(tokenizer_json).get("decoder")
        self._byte_level = [step["type"] for step in _steps(decoder)] == ["ByteLevel"]
        # Such decoders only ever append to what they have made, so decoding in whole equals decoding in pieces.
        self._appends = all(map(_appends, _steps(decoder)))
        added = self._tokenizer.get_added_tokens_decoder()
        self._added: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self._special: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes = _TokenBytes(self._tokenizer.id_to_token)
        self._token_texts: dict[int, str] = {}
        self._anchor: list[int] | None = None

    def text(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of `token_ids` after a prompt (its last 24 ids are enough). Bytes without a meaning become U+FFFD."""
        if self._byte_level:  # what the tokenizer's own call would say, in a fifth of the time
            if skip_special_tokens and not self._special.isdisjoint(token_ids):
                token_ids = [token_id for token_id in token_ids if token_id not in self._special]
            return b"".join(map(self._bytes.__getitem__, token_ids)).decode("utf-8", "replace")
        if self._appends and (skip_special_tokens or spaces_between_special_tokens):
            context = self._context(prompt_token_ids, skip_special_tokens)
            before = self._decode(context, skip_special_tokens)
            whole = self._decode([*context, *token_ids], skip_special_tokens)
            if whole.startswith(before) and UNFINISHED not in whole:
                return whole[len(before) :]
        stream = self.stream(prompt_token_ids, skip_special_tokens, spaces_between_special_tokens)
        return "".join([*map(stream.push, token_ids), stream.flush()])

    def stream(
        self,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> _Stream:
        """The same text, in pieces: push(id) returns the characters that id completes, flush() what is left."""
        hidden = self._special if skip_special_tokens else frozenset()
        if self._byte_level:
            return _ByteStream(self, hidden)
        context = self._context(prompt_token_ids, skip_special_tokens)
        return _WindowStream(
            self, context, hidden, raw_added=not (skip_special_tokens or spaces_between_special_tokens)
        )

    def token_text(self, token_id: int) -> str:
        """Text of one token, special ones too, its leading space kept; U+FFFD for parts of characters."""
        text = self._token_texts.get(token_id)
        if text is None:
            anchor = self._find_anchor()
            before, whole = self._decode(anchor, False), self._decode([*anchor, token_id], False)
            text = whole[len(before) :] if whole.startswith(before) else self._decode([token_id], False)
            self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What a byte-level tokenizer's token stands for."""
        return self._bytes[token_id]

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _context(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        """The shortest end of the prompt, of 4 ids or more, that decodes to whole characters; none if there is none."""
        tail = list(prompt_token_ids[-MAX_CONTEXT:])
        for length in range(min(4, len(tail)), len(tail) + 1):
            context = tail[len(tail) - length :]
            if UNFINISHED not in self._decode(context, skip_special_tokens):
                return context
        return []

    def _find_anchor(self) -> list[int]:
        """A token to decode others behind: decoders which strip a text's first space then strip nothing of theirs."""
        if self._anchor is None:
            self._anchor = []
            for token_id in range(0 if self._byte_level else min(self._tokenizer.get_vocab_size(), 4096)):
                if token_id not in self._added and self._decode([token_id], False).isalnum():
                    self._anchor = [token_id]
                    break
        return self._anchor


class _TokenBytes(dict[int, bytes]):
    """What each token of a byte-level tokenizer stands for, found when it is first asked for."""

    def __init__(self, id_to_token: Callable[[int], str | None]) -> None:
        super().__init__()
        self._id_to_token = id_to_token

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id) or ""
        marks = [_BYTE_OF.get(char) for char in token]
        piece = token.encode() if None in marks else bytes(mark for mark in marks if mark is not None)
        self[token_id] = piece
        return piece


class _ByteStream:
    """Byte-level tokenizers: tokens are bytes, so an incremental UTF-8 decoder is all there is to it."""

    def __init__(self, owner: Detokenizer, hidden: frozenset[int]) -> None:
        self._owner, self._hidden = owner, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._hidden else self._utf8.decode(self._owner.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """Any other tokenizer: decodes the tokens that wait behind the ones shown last, and shows what that adds."""

    def __init__(self, owner: Detokenizer, context: list[int], hidden: frozenset[int], raw_added: bool) -> None:
        self._owner, self._hidden, self._raw_added = owner, hidden, raw_added
        self._window = [token_id for token_id in context if token_id not in hidden]
        self._shown = len(self._window)  # tokens of the window whose text is out
        self._before = owner._decode(self._window, False)
        self._after_added = False

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        added = token_id in self._owner._added
        text = self._owner._decode(self._window, False)
        if self._raw_added and added and self._after_added:
            return self._show(self._owner._added[token_id])
        self._after_added = added
        waiting = len(self._window) - self._shown
        if waiting < MAX_PENDING and (text.endswith(UNFINISHED) or len(text) <= len(self._before)):
            return ""
        return self._show(self._added_by_window(text))

    def flush(self) -> str:
        return self._added_by_window(self._owner._decode(self._window, False))

    def _added_by_window(self, text: str) -> str:
        if text.startswith(self._before):
            return text[len(self._before) :]
        # A byte that is no character spoils its whole run, shown characters too: what waits is then decoded alone.
        return self._owner._decode(self._window[self._shown :], False)

    def _show(self, text: str) -> str:
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        self._before = self._owner._decode(self._window, False)
        return text


class StopMatch(NamedTuple):
    """Where a stop string ended an output."""

    num_tokens: int  # of the ids given to this `feed`, those that belong to the output
    stop_string: str
    text: str  # of the whole output, cut


class StopChecker:
    """Watches one output for stop strings, token by token, at a cost per token that does not grow with the output."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str],
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        assert stop
        assert all(stop)
        self._stream = detokenizer.stream(prompt_token_ids, skip_special_tokens, spaces_between_special_tokens)
        self._stop = list(stop)
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._keep = max(map(len, stop)) - 1  # characters that may begin a match
        self._pieces: list[str] = []
        self._tail = ""  # the last characters of the text so far
        self._num_tokens = 0

    def feed(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Takes the output's next ids. A match ends the output at the token that completes it; later ids do not count.

        Matches that end within the first `min_tokens` tokens do not count. Of several that one token completes, the one
        that begins first is taken, then the one that stands first in `stop`.
        """
        for position, token_id in enumerate(token_ids):
            piece = self._stream.push(token_id)
            self._num_tokens += 1
            if not piece:
                continue
            self._pieces.append(piece)
            text = self._tail + piece
            if self._num_tokens > self._min_tokens:
                match = self._match(text, len(piece))
                if match is not None:
                    stop_string, num_dropped = match
                    whole = "".join(self._pieces)
                    return StopMatch(position + 1, stop_string, whole[: len(whole) - num_dropped])
            self._tail = text[-self._keep :] if self._keep else ""
        return None

    def _match(self, text: str, num_new: int) -> tuple[str, int] | None:
        """The stop string that ends in the last `num_new` characters of `text`, and how many characters to cut."""
        best: tuple[str, int] | None = None
        first = len(text)
        for stop in self._stop:
            start = text.find(stop, max(0, len(text) - num_new - len(stop) + 1))
            if 0 <= start < first:
                first = start
                best = stop, len(text) - start - (len(stop) if self._include else 0)
        return best


class SlowDetokenizer:
    """For tokenizers without a fast backend: a Hugging Face tokenizer decodes. No streams, so no stop strings."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of `token_ids`; the prompt is not looked at."""
        return str(
            self._tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )
        )

    def token_text(self, token_id: int) -> str:
        """Text of one token."""
        return str(self._tokenizer.decode([token_id]))


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoder's steps; a tokenizer without a decoder joins tokens with spaces."""
    if decoder is None:
        return [{"type": "none"}]
    if decoder["type"] == "Sequence":
        return [inner for step in decoder["decoders"] for inner in _steps(step)]
    return [decoder]


def _appends(step: dict[str, Any]) -> bool:
    """Whether what this step makes of the first tokens stays as it is when more tokens follow."""
    if step["type"] == "Strip":
        return bool(step["stop"] == 0)
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": "▁"})
    return step["type"] in ("ByteLevel", "Metaspace", "ByteFallback", "Fuse")


def _byte_marks() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the other ones for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF = _byte_marks()
