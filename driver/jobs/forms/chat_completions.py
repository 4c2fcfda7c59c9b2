"""/v1/chat/completions: from a body to a request, from an output to a body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shoal.driver.jobs.faults import RowError
from shoal.driver.jobs.forms.base import RowRequest

if TYPE_CHECKING:
    from shoal.driver.outputs import CompletionOutput, Logprob, RequestOutput

PREFIX = "chatcmpl"
_CHAT_FIELDS = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
FIELDS = ("messages", "logprobs", "top_logprobs", "max_completion_tokens", "tool_choice", *_CHAT_FIELDS)


def request(body: Mapping[str, Any]) -> RowRequest:
    """A conversation; without a limit, the answer may be as long as the model's context leaves."""
    if body.get("messages") is None:
        raise RowError("invalid_body", "parameters", "body has no messages")
    if body.get("tool_choice") not in (None, "auto", "none"):
        message = f"tool_choice={body['tool_choice']!r:.80} is not supported by this version of Shoal"
        raise RowError("unsupported_parameter", "parameters", message)
    found = RowRequest(messages=body["messages"], fallback={"max_tokens": None})
    limit = body.get("max_completion_tokens")
    if limit is not None:
        found.sampling["max_tokens"] = limit
    if body.get("logprobs"):
        found.sampling["logprobs"] = body.get("top_logprobs") or 0
    elif body.get("top_logprobs"):
        raise RowError("invalid_parameter", "parameters", "top_logprobs needs logprobs=true")
    found.chat = {name: body[name] for name in _CHAT_FIELDS if body.get(name) is not None}
    if body.get("tool_choice") == "none":
        found.chat.pop("tools", None)
    return found


def body(output: RequestOutput, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A chat.completion object's own fields."""
    best = asked.get("top_logprobs") or 0
    return {"object": "chat.completion", "choices": [_choice(one, best) for one in output.outputs]}


def _choice(one: CompletionOutput, best: int) -> dict[str, Any]:
    return {
        "index": one.index,
        "message": {"role": "assistant", "content": one.text, "refusal": None},
        "logprobs": None if one.logprobs is None else {"content": [_token(entry, best) for entry in one.logprobs]},
        "finish_reason": one.finish_reason,
        "stop_reason": one.stop_reason,
    }


def _token(entry: Mapping[int, Logprob], best: int) -> dict[str, Any]:
    """The sampled token is the first of an entry; it is one of the best ones where its rank says so."""
    ranked = sorted(entry.values(), key=lambda found: found.rank or 0)
    return {**_described(next(iter(entry.values()))), "top_logprobs": [_described(one) for one in ranked[:best]]}


def _described(found: Logprob) -> dict[str, Any]:
    text = found.decoded_token or ""
    return {"token": text, "logprob": found.logprob, "bytes": list(text.encode("utf-8", "replace"))}
