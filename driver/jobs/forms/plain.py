"""Plain rows: a prompt or messages column, the row's own fields kept, answers as more columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.forms.base import RowRequest, parse_json_text, text_id
from shoal.driver.jobs.template import PromptTemplate
from shoal.driver.outputs import Logprob

if TYPE_CHECKING:
    from shoal.driver.config import EngineConfig
    from shoal.driver.outputs import CompletionOutput, RequestOutput

ID_COLUMNS = ("id", "custom_id")  # where a job names none
_MODEL_COLUMN = "model"


class TableConfig(Protocol):
    """What the form must be told: fields of JobConfig, and of others that read tables."""

    @property
    def engine(self) -> EngineConfig: ...
    @property
    def id_column(self) -> str | None: ...
    @property
    def prompt_column(self) -> str: ...
    @property
    def messages_column(self) -> str: ...
    @property
    def sampling_column(self) -> str: ...
    @property
    def prompt_template(self) -> str | None: ...
    @property
    def as_chat(self) -> bool: ...
    @property
    def columns(self) -> list[str] | None: ...
    @property
    def token_ids(self) -> bool: ...


class PlainForm:
    """Rows of a table."""

    separate_errors = False

    def __init__(self, config: TableConfig) -> None:
        self._config = config
        self._template = (
            None
            if config.prompt_template is None
            else PromptTemplate(config.prompt_template, config.engine.allowed_local_path)
        )

    def reads(self) -> frozenset[str] | None:
        """Any, unless those to keep are named: then these, and those that make the id and the request."""
        config = self._config
        if config.columns is None:
            return None
        ids = ID_COLUMNS if config.id_column is None else (config.id_column,)
        made_of = {config.prompt_column, config.messages_column, config.sampling_column, _MODEL_COLUMN}
        names = frozenset() if self._template is None else self._template.names
        return names.union(config.columns, ids, made_of)

    def row_id(self, columns: dict[str, Any]) -> str | None:
        """From `id_column`, else from id or custom_id where the row has one."""
        name = self._config.id_column
        if name is not None:
            if columns.get(name) is None:
                raise RowError("missing_column", "validate", f"the row has no {name!r} (id_column)")
            return text_id(columns[name], name)
        name = _own_id_column(columns)
        return None if name is None else text_id(columns[name], name)

    def check(self, columns: dict[str, Any]) -> None:
        """Whether there is something to answer."""
        config = self._config
        if self._template is not None:
            missing = sorted(name for name in self._template.columns if name not in columns)
            if missing:
                raise RowError("missing_column", "validate", f"prompt_template needs {', '.join(map(repr, missing))}")
        elif columns.get(config.prompt_column) is None and columns.get(config.messages_column) is None:
            has = "it has" if config.columns is None else "of the columns that are read it has"
            raise RowError(
                "missing_column",
                "validate",
                f"the row has neither {config.prompt_column!r} nor {config.messages_column!r}; "
                f"{has} {', '.join(map(repr, columns)) or 'none'}",
            )
        for name in config.columns or ():
            if name not in columns:
                raise RowError("missing_column", "validate", f"the row has no {name!r} (columns)")

    def request(self, columns: dict[str, Any]) -> RowRequest:
        """The prompt from the template, the prompt column or the messages column, in this order."""
        self.check(columns)
        config = self._config
        sampling = parse_json_text(columns.get(config.sampling_column), config.sampling_column)
        if sampling is not None and not isinstance(sampling, Mapping):
            raise RowError(
                "invalid_parameter",
                "parameters",
                f"{config.sampling_column} must be an object, got {type(sampling).__name__}",
            )
        model = columns.get(_MODEL_COLUMN)
        request = RowRequest(sampling=dict(sampling or {}), model=model if isinstance(model, str) else None)
        prompt = columns.get(config.prompt_column)
        if self._template is not None:
            prompt = self._template.render(columns)
        if prompt is None:
            messages = parse_json_text(columns[config.messages_column], config.messages_column)
            request.messages = _without_nulls(messages)
        elif config.as_chat:
            if not isinstance(prompt, str):
                raise RowError("invalid_value", "template", "as_chat needs prompts that are text, not token ids")
            request.messages = [{"role": "user", "content": prompt}]
        else:
            request.prompt = prompt
        return request

    def answer(self, row_id: str, columns: dict[str, Any], output: RequestOutput) -> dict[str, Any]:
        """The row's fields, then those of the answer."""
        return {
            **self._kept(row_id, columns),
            **answer_columns(output, token_ids=self._config.token_ids, always_completions=False),
            "error": None,
        }

    def failure(self, row_id: str, columns: dict[str, Any] | None, fault: Fault) -> dict[str, Any]:
        """The row's fields, and why it has no answer."""
        return {**self._kept(row_id, columns or {}), "generated_text": None, "error": fault.as_dict()}

    def _kept(self, row_id: str, columns: dict[str, Any]) -> dict[str, Any]:
        names = self._config.columns
        kept = columns if names is None else {name: columns.get(name) for name in names}
        id_column = self._config.id_column or _own_id_column(columns) or "id"
        own = columns.get(id_column)
        return {id_column: row_id if own is None else own, **{k: v for k, v in kept.items() if k != id_column}}


def _own_id_column(columns: Mapping[str, Any]) -> str | None:
    for name in ID_COLUMNS:
        if columns.get(name) is not None:
            return name
    return None


def answer_columns(output: RequestOutput, *, token_ids: bool, always_completions: bool) -> dict[str, Any]:
    """The columns that an answer adds to a row. Those without an index are of the first completion, counts of all."""
    first = output.outputs[0]
    found: dict[str, Any] = {
        "generated_text": first.text,
        "finish_reason": first.finish_reason,
        "stop_reason": None if first.stop_reason is None else str(first.stop_reason),
        "num_input_tokens": len(output.prompt_token_ids or ()),
        "num_generated_tokens": sum(len(one.token_ids) for one in output.outputs),
        "num_cached_tokens": output.num_cached_tokens,
    }
    if token_ids:
        found |= {"prompt_token_ids": output.prompt_token_ids, "generated_tokens": list(first.token_ids)}
    if first.logprobs is not None:
        found |= {"logprobs": logprob_columns(first), "cumulative_logprob": first.cumulative_logprob}
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = [None if d is None else _entry(d) for d in output.prompt_logprobs]
    if always_completions or len(output.outputs) > 1:
        found["completions"] = [_completion(one, token_ids) for one in output.outputs]
    return found


def _completion(one: CompletionOutput, token_ids: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "index": one.index,
        "text": one.text,
        "finish_reason": one.finish_reason,
        "stop_reason": None if one.stop_reason is None else str(one.stop_reason),
        "num_tokens": len(one.token_ids),
    }
    if token_ids:
        found["token_ids"] = list(one.token_ids)
    if one.logprobs is not None:
        found |= {"logprobs": logprob_columns(one), "cumulative_logprob": one.cumulative_logprob}
    return found


def logprob_columns(one: CompletionOutput) -> list[list[dict[str, Any]]]:
    """For each token a list: the sampled one first, then the best others."""
    return [_entry(entry) for entry in one.logprobs or ()]


def _entry(entry: Mapping[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": token, "logprob": found.logprob, "rank": found.rank, "token": found.decoded_token}
        for token, found in entry.items()
    ]


def _without_nulls(messages: Any) -> Any:
    """Tables give every message every field that any of them has; a null there means: not given."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]
