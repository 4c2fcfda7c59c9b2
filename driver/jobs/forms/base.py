"""What a form of rows is: how columns become a request, and an output becomes a row of the output."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from shoal.driver.jobs.faults import Fault, RowError

if TYPE_CHECKING:
    from shoal.driver.jobs.config import JobConfig
    from shoal.driver.outputs import RequestOutput

FORMS = {
    "openai": "shoal.driver.jobs.forms.openai:OpenAIForm",
    "rows": "shoal.driver.jobs.forms.plain:PlainForm",
}


@dataclass(slots=True)
class RowRequest:
    """What a row asks for, not yet checked against the model."""

    prompt: Any = None  # text, token ids or a prompt dict; None where there are messages
    messages: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)  # over the job's; None means not given
    fallback: dict[str, Any] = field(default_factory=dict)  # sampling parameters under those of model and job
    chat: dict[str, Any] = field(default_factory=dict)  # arguments of the chat renderer
    model: str | None = None  # the model that the row names


class Form(Protocol):
    """One way to write rows. Methods raise RowError for what is wrong with the one row."""

    separate_errors: bool  # rows in error go to a file of their own, unless the job says otherwise

    def reads(self) -> frozenset[str] | None:
        """Columns that it looks at or keeps; None: any."""
        ...

    def row_id(self, columns: dict[str, Any]) -> str | None:
        """The row's own id; None where it has none."""
        ...

    def check(self, columns: dict[str, Any]) -> None:
        """What can be seen without the model: columns that are missing."""
        ...

    def request(self, columns: dict[str, Any]) -> RowRequest:
        """What the row asks for."""
        ...

    def answer(self, row_id: str, columns: dict[str, Any], output: RequestOutput) -> dict[str, Any]:
        """The output row of an answered row."""
        ...

    def failure(self, row_id: str, columns: dict[str, Any] | None, fault: Fault) -> dict[str, Any]:
        """The output row of one that has no answer. `columns`: None where the row could not be read."""
        ...


def make_form(name: str, config: JobConfig) -> Form:
    """The form of that name."""
    module, attribute = FORMS[name].split(":")
    form: Form = getattr(import_module(module), attribute)(config)
    return form


def text_id(value: Any, column: str) -> str:
    """An id as text. RowError for what is none."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError("invalid_id", "read", f"{column} must be a non-empty string or an integer, got {value!r:.80}")


def parse_json_text(value: Any, column: str) -> Any:
    """Tables without nesting hold lists and objects as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError("invalid_value", "read", f"{column} is text that is not JSON: {error}") from None
