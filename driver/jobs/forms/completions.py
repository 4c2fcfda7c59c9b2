"""/v1/completions: from a body to a request, from an output to a body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shoal.driver.jobs.faults import RowError
from shoal.driver.jobs.forms.base import RowRequest

if TYPE_CHECKING:
    from shoal.driver.outputs import CompletionOutput, RequestOutput

PREFIX = "cmpl"
FIELDS = ("prompt", "logprobs")


def request(body: Mapping[str, Any]) -> RowRequest:
    """One prompt, as text or as token ids."""
    prompt = body.get("prompt")
    if prompt is None:
        raise RowError("invalid_body", "parameters", "body has no prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        raise RowError("unsupported_parameter", "parameters", f"{len(prompt)} prompts in one line: give each its own")
    found = RowRequest(prompt=prompt)
    if body.get("logprobs") is not None:
        found.sampling["logprobs"] = body["logprobs"]
    return found


def body(output: RequestOutput, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A text_completion object's own fields."""
    return {"object": "text_completion", "choices": [_choice(one) for one in output.outputs]}


def _choice(one: CompletionOutput) -> dict[str, Any]:
    return {
        "index": one.index,
        "text": one.text,
        "logprobs": None if one.logprobs is None else _logprobs(one),
        "finish_reason": one.finish_reason,
        "stop_reason": one.stop_reason,
    }


def _logprobs(one: CompletionOutput) -> dict[str, Any]:
    tokens: list[str] = []
    values: list[float] = []
    best: list[dict[str, float]] = []
    offsets: list[int] = []
    offset = 0
    for entry in one.logprobs or ():
        sampled = next(iter(entry.values()))
        text = sampled.decoded_token or ""
        tokens.append(text)
        values.append(sampled.logprob)
        best.append({found.decoded_token or "": found.logprob for found in entry.values()})
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}
