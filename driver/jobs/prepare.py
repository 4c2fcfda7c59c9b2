"""Rows' requests to token ids: renders chat templates, tokenizes, checks parameters. In tasks, away from the driver."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.driver.binding import Bound
from shoal.driver.chat import ChatRenderer
from shoal.driver.inputs import Prompt, parse_prompt
from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.forms.base import RowRequest
from shoal.driver.jobs.model import ModelTools
from shoal.driver.params import SamplingParams

_KNOWN_SETS = 1024  # sampling parameters and chat renderers that are kept

T = TypeVar("T")


@dataclass(slots=True)
class Ready:
    """A row's prompt and parameters, checked against the model."""

    token_ids: list[int]
    prompt: str | None  # its text; None where token ids were given
    sampling: str  # its sampling parameters, as `BoundSet` takes them


class BoundSet:
    """Sampling parameters by name, which is their JSON: rows mostly share theirs, so each set is checked once."""

    def __init__(self, tools: ModelTools) -> None:
        self._binder = tools.binder
        self._known: OrderedDict[str, Bound] = OrderedDict()

    def find(self, name: str) -> Bound:
        """Raises what is wrong with them: TypeError, ValueError, OverflowError."""
        known = self._known.get(name)
        if known is None:
            bound = self._binder.bind(SamplingParams.from_optional(**json.loads(name)))
            known = _remember(self._known, name, bound)
        return known


class RowPreparer:
    """Makes rows ready. For one thread."""

    def __init__(
        self,
        tools: ModelTools,
        sampling_params: Mapping[str, Any],
        chat_template_kwargs: Mapping[str, Any],
        only_model: str | None = None,
    ) -> None:
        """`sampling_params`: of all rows, under their own. `only_model`: rows that name another one are refused."""
        self._tools, self._only_model = tools, only_model
        self._sampling = {**tools.default_sampling, **sampling_params}
        self._common = ""  # the name of the parameters of rows that bring none
        self._chat_kwargs = chat_template_kwargs
        self._bounds = BoundSet(tools)
        self._renderers: OrderedDict[str, ChatRenderer] = OrderedDict()

    def prepare(self, requests: Sequence[RowRequest]) -> list[Ready | Fault]:
        """Each row ready, or what is wrong with it."""
        results: list[Ready | Fault | None] = [None] * len(requests)
        parsed: dict[bool, list[tuple[int, Prompt, str]]] = {True: [], False: []}
        for place, request in enumerate(requests):
            try:
                prompt, sampling = self._parse(request)
            except RowError as error:
                results[place] = error.fault
            else:
                parsed[request.messages is None].append((place, prompt, sampling))
        for special, group in parsed.items():  # a chat template's text has its special tokens already
            options = self._tools.inputs.options(None, special)
            found = self._tools.inputs.tokenize([prompt for _, prompt, _ in group], options)
            for (place, prompt, sampling), ids in zip(group, found, strict=True):
                if isinstance(ids, Exception):
                    results[place] = Fault("invalid_prompt", "tokenize", str(ids))
                else:
                    results[place] = Ready(ids, prompt.text, sampling)
        return [result for result in results if result is not None]

    def _parse(self, request: RowRequest) -> tuple[Prompt, str]:
        if self._only_model is not None and request.model not in (None, self._only_model):
            message = f"the row asks for the model {request.model!r}, the job runs {self._only_model!r}"
            raise RowError("model_mismatch", "parameters", message)
        try:
            own = request.fallback or request.sampling
            sampling = self._common
            if own or not sampling:
                sampling = json.dumps({**request.fallback, **self._sampling, **request.sampling}, sort_keys=True)
            self._bounds.find(sampling)
            self._common = self._common if own else sampling
        except (TypeError, ValueError, OverflowError) as error:
            raise RowError("invalid_parameter", "parameters", str(error)) from None
        chat = request.messages is not None
        try:
            prompt = self._renderer(request.chat)(request.messages) if chat else parse_prompt(request.prompt)
        except (TypeError, ValueError, NotImplementedError) as error:
            what, stage = ("messages", "template") if chat else ("prompt", "tokenize")
            raise RowError(f"invalid_{what}", stage, str(error)) from None
        return prompt, sampling

    def _renderer(self, chat: dict[str, Any]) -> ChatRenderer:
        arguments = {**chat}
        extra = arguments.pop("chat_template_kwargs", None)
        if extra is not None and not isinstance(extra, dict):
            raise TypeError(f"chat_template_kwargs must be an object, got {type(extra).__name__}")
        arguments["chat_template_kwargs"] = {**self._chat_kwargs, **(extra or {})}
        arguments.setdefault("chat_template", self._tools.chat_template)
        name = json.dumps(arguments, sort_keys=True)
        known = self._renderers.get(name)
        if known is None:
            known = _remember(self._renderers, name, ChatRenderer(self._tools.tokenizer, **arguments))
        return known


def one_thread() -> None:
    """In a task's process: tokenizers use the task's share of a core, and not all cores at once, which costs more of
    them and takes them from the engines. What the environment says goes first."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _remember(known: OrderedDict[str, T], name: str, value: T) -> T:
    known[name] = value
    if len(known) > _KNOWN_SETS:
        known.popitem(last=False)
    return value
