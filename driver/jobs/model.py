"""A model as rows need it: found before anything else, started when the first row needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from shoal.driver.binding import Binder
from shoal.driver.chat import load_chat_template
from shoal.driver.client import Client
from shoal.driver.config import EngineConfig
from shoal.driver.inputs import InputProcessor
from shoal.driver.params import SamplingParams, check_shared
from shoal.driver.resolve import check_model_len

if TYPE_CHECKING:
    from shoal.driver.detokenize import TextDecoder
    from shoal.driver.model_config import ResolvedModel
    from shoal.driver.replica import EngineLike, Place, StartEngine

# Sampling parameters that a Binder compares with the model.
_OF_MODEL = {"logit_bias", "allowed_token_ids", "stop_token_ids", "logprobs", "prompt_logprobs", "stop", "bad_words"}


@dataclass(slots=True)
class ModelTools:
    """What turns rows into requests and results into text, for rows up to a certain length."""

    inputs: InputProcessor
    binder: Binder
    decoder: TextDecoder | None
    tokenizer: Any
    chat_template: str | None
    default_sampling: dict[str, Any]  # of the model's generation_config


@dataclass(frozen=True)
class RowModel:
    """What is known of a model without an engine."""

    config: EngineConfig
    resolved: ResolvedModel
    tokenizer: Any
    tokenizer_json: str | None

    @classmethod
    def find(cls, config: EngineConfig) -> RowModel:
        """Reads the model's config and tokenizer. ValueError where it cannot be used."""
        from shoal.driver.model_config import resolve_all

        return cls(config, *resolve_all(config))

    def starter(self, solo_deaths: int, silence_s: float | None = None) -> StartEngine:
        """Starts one engine of it, which ends a row with which alone its ranks died so often; see Engine.start."""

        def start(place: Place | None = None) -> EngineLike:
            from shoal.driver.engine import Engine

            config = self.config.model_copy(update={"max_solo_deaths": solo_deaths})
            model = (self.resolved, self.tokenizer, self.tokenizer_json)
            return Engine.start(config, lambda: model, False, place, silence_s)

        return start

    def check(self, sampling_params: Mapping[str, Any]) -> None:
        """ValueError where parameters of all rows ask for what this model or its tokenizer does not have."""
        if not _OF_MODEL.isdisjoint(sampling_params):  # else nothing is to be looked up: tools cost time
            try:
                self.tools().binder.bind(check_shared(sampling_params))
            except ValueError as error:
                raise ValueError(f"sampling_params: {error}") from None

    def portable(self) -> RowModel:
        """The same for processes elsewhere that only prepare rows: templates as text, nothing secret, no code."""
        config, template = self.config, self.config.chat_template
        if self.tokenizer is not None:
            template = load_chat_template(template, self.tokenizer, config.allowed_local_path)
        changes: dict[str, Any] = {"chat_template": template, "hf_overrides": None, "logits_processors": []}
        plain = config.model_copy(update={**changes, "hf_token": None, "allowed_local_path": None})
        return replace(self, config=plain, resolved=replace(self.resolved, hf_config=None))

    def tools(self, max_model_len: int | None = None) -> ModelTools:
        """Tools for rows of up to `max_model_len` tokens; None: what the model allows, before an engine says less."""
        client = Client(
            _NoEngine(),
            self.config,
            self.resolved.spec,
            self.resolved.generation_config,
            self.tokenizer,
            self.tokenizer_json,
            max_model_len=max_model_len or check_model_len(self.config, self.resolved.spec),
            max_num_seqs=1,
        )
        plain, own = SamplingParams(), client.default_params()
        names = [field.name for field in fields(SamplingParams)]
        changed = {name: getattr(own, name) for name in names if getattr(own, name) != getattr(plain, name)}
        template = self.config.chat_template
        return ModelTools(client.inputs, client.binder, client.decoder, self.tokenizer, template, changed)


class _NoEngine:
    """Rows go to engines of their own, never through the Client that their tools come from."""

    window = 0

    def submit(self, requests: Any) -> None:
        """Never called."""
        raise AssertionError

    def collect(self, timeout: float) -> Any:
        """Never called."""
        raise AssertionError

    def abort(self, numbers: Any) -> None:
        """Never called."""
        raise AssertionError


MakeModel = Callable[[EngineConfig], RowModel]
