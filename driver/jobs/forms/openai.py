"""OpenAI batch lines: {"custom_id", "method", "url", "body"} in, {"id", "custom_id", "response", "error"} out."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.forms.base import RowRequest, text_id
from shoal.driver.jobs.keys import id_hash

if TYPE_CHECKING:
    from shoal.driver.jobs.config import JobConfig
    from shoal.driver.outputs import RequestOutput

# url: module with FIELDS, `request(body)` and `body(output)`
ENDPOINTS = {
    "/v1/chat/completions": "shoal.driver.jobs.forms.chat_completions",
    "/v1/completions": "shoal.driver.jobs.forms.completions",
}
# Fields of both endpoints that are sampling parameters here, under the same name.
SAMPLING_FIELDS = (
    "frequency_penalty", "presence_penalty", "logit_bias", "n", "seed", "stop", "temperature", "top_p", "max_tokens",
    # beyond OpenAI's, as servers of open models take them
    "top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "bad_words",
    "allowed_token_ids", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    "prompt_logprobs",
)  # fmt: skip
# Fields that say nothing about the answer.
NEUTRAL_FIELDS = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields whose plain value is what happens anyway.
FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "stream_options": (None,),
    "response_format": (None, {"type": "text"}),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None,),
}


class OpenAIForm:
    """Batch lines of OpenAI's Batch API."""

    separate_errors = True

    def __init__(self, config: JobConfig) -> None:
        self._config = config

    def reads(self) -> frozenset[str] | None:
        """Any: lines come with few others."""
        return None

    def row_id(self, columns: dict[str, Any]) -> str | None:
        """custom_id, which every line must have."""
        if columns.get("custom_id") is None:
            raise RowError("missing_column", "validate", "the line has no custom_id")
        return text_id(columns["custom_id"], "custom_id")

    def check(self, columns: dict[str, Any]) -> None:
        """Whether it is a batch line for an endpoint that there is."""
        missing = [name for name in ("url", "body") if columns.get(name) is None]
        if missing:
            raise RowError("missing_column", "validate", f"the line has no {' and no '.join(missing)}")
        if columns.get("method", "POST") != "POST":
            raise RowError("invalid_method", "validate", f"method must be POST, got {columns['method']!r}")
        if columns["url"] not in ENDPOINTS:
            known = ", ".join(ENDPOINTS)
            raise RowError("invalid_url", "validate", f"url must be one of {known}, got {columns['url']!r:.80}")
        if not isinstance(columns["body"], Mapping):
            kind = type(columns["body"]).__name__
            raise RowError("invalid_body", "validate", f"body must be an object, got {kind}")

    def request(self, columns: dict[str, Any]) -> RowRequest:
        """What the body asks for."""
        self.check(columns)
        body = columns["body"]
        endpoint = _endpoint(columns)
        known = {*SAMPLING_FIELDS, *NEUTRAL_FIELDS, *FIXED_FIELDS, *endpoint.FIELDS}
        for name, value in body.items():
            if name not in known and value is not None:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RowError("unknown_parameter", "parameters", f"body has an unknown field {name!r}{hint}")
            if name in FIXED_FIELDS and value not in FIXED_FIELDS[name]:
                message = f"{name}={value!r:.80} is not supported by this version of Shoal"
                raise RowError("unsupported_parameter", "parameters", message)
        request: RowRequest = endpoint.request(body)
        own = {name: body[name] for name in SAMPLING_FIELDS if body.get(name) is not None}
        request.sampling = {**own, **request.sampling}
        model = body.get("model")
        request.model = model if isinstance(model, str) else None
        return request

    def answer(self, row_id: str, columns: dict[str, Any], output: RequestOutput) -> dict[str, Any]:
        """A line of the output file."""
        key = id_hash(row_id).hex()
        endpoint = _endpoint(columns)
        named = columns["body"].get("model")
        usage = {
            "prompt_tokens": (prompt := len(output.prompt_token_ids or ())),
            "completion_tokens": (made := sum(len(one.token_ids) for one in output.outputs)),
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens or 0},
        }
        body = {
            **endpoint.body(output, columns["body"]),
            "created": int(time.time()),
            "model": named if isinstance(named, str) else self._config.engine.model,
            "usage": usage,
        }
        return {
            "id": f"batch_req_{key}",
            "custom_id": columns["custom_id"],
            "response": {"status_code": 200, "request_id": key, "body": {"id": f"{endpoint.PREFIX}-{key}", **body}},
            "error": None,
        }

    def failure(self, row_id: str, columns: dict[str, Any] | None, fault: Fault) -> dict[str, Any]:
        """A line of the error file: faults of the request carry a response, as the API has it, others an error."""
        key = id_hash(row_id).hex()
        line: dict[str, Any] = {"id": f"batch_req_{key}", "custom_id": (columns or {}).get("custom_id", row_id)}
        if fault.stage in ("read", "validate", "engine"):
            return {**line, "response": None, "error": fault.as_dict()}
        error = {"message": fault.message, "type": "invalid_request_error", "param": None, "code": fault.code}
        response = {"status_code": 400, "request_id": key, "body": {"error": error}}
        return {**line, "response": response, "error": fault.as_dict()}


def _endpoint(columns: dict[str, Any]) -> ModuleType:
    return import_module(ENDPOINTS[columns["url"]])
