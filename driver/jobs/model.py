"""A job's model: found before anything else, started when the first row needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from shoal.driver.client import Client
from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.prepare import ModelTools
from shoal.driver.params import SamplingParams

if TYPE_CHECKING:
    from shoal.driver.detokenize import TextDecoder
    from shoal.driver.model_config import ResolvedModel
    from shoal.driver.replica import EngineLike, StartEngine
    from shoal.driver.resolve import ResolvedConfig


@dataclass(frozen=True)
class JobModel:
    """What is known of the model without an engine."""

    config: JobConfig
    resolved: ResolvedModel
    tokenizer: Any
    tokenizer_json: str | None

    @classmethod
    def find(cls, config: JobConfig) -> JobModel:
        """Reads the model's config and tokenizer. ValueError where it cannot be used."""
        from shoal.driver.model_config import resolve_all

        return cls(config, *resolve_all(config.engine))

    def starter(self) -> StartEngine:
        """Starts one engine of it."""

        def start() -> EngineLike:
            from shoal.driver.engine import Engine

            return Engine.start(self.config.engine, lambda: (self.resolved, self.tokenizer, self.tokenizer_json))

        return start

    def tools(self, resolved: ResolvedConfig) -> tuple[ModelTools, TextDecoder | None]:
        """What rows need of the model, once an engine has said how long a row may be."""
        client = Client(
            _NoEngine(),
            self.config.engine,
            self.resolved.spec,
            self.resolved.generation_config,
            self.tokenizer,
            self.tokenizer_json,
            max_model_len=resolved.max_model_len,
            max_num_seqs=resolved.max_num_seqs,
        )
        plain, own = SamplingParams(), client.default_params()
        names = [field.name for field in fields(SamplingParams)]
        changed = {name: getattr(own, name) for name in names if getattr(own, name) != getattr(plain, name)}
        template = self.config.engine.chat_template
        return ModelTools(client.inputs, client.binder, self.tokenizer, template, changed), client.decoder


class _NoEngine:
    """Rows go to the job's own engines, never through the Client that their tools come from."""

    def submit(self, requests: Any) -> None:
        """Never called."""
        raise AssertionError

    def collect(self, timeout: float) -> Any:
        """Never called."""
        raise AssertionError

    def abort(self, numbers: Any) -> None:
        """Never called."""
        raise AssertionError


MakeModel = Callable[[JobConfig], JobModel]
