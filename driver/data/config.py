"""ProcessorConfig: what a step of a Ray Data pipeline is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.driver.config import make_config
from shoal.driver.jobs.config import SharedParams, TableEngine

_OPEN_FACTOR = 16  # rows in blocks for one slot: the slowest row of a block is many times as long as the mean one
_BLOCKS_OF_SLOTS = 4  # blocks that make a full batch
_LEAST_ROWS = 32  # of a block
_MOST_BLOCKS = 512  # each is a thread of the engine's actor


class ProcessorConfig(BaseModel):
    """One step that answers rows. Field names are those of JobConfig where it has the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True)

    engine: TableEngine
    """Engine arguments, as in LLM(...): a mapping, or a ready EngineConfig."""

    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of token ids."""
    messages_column: str = "messages"
    """Column with a conversation; used where a row has no prompt."""
    sampling_column: str = "sampling_params"
    """Column with a row's own sampling parameters, over those of the config; a null in it means: not given."""
    id_column: str | None = None
    """Column with an id of each row: the same id draws the same tokens in every run. None: `id` or `custom_id` where
    rows have it, else rows without a seed draw anew in every run."""
    prompt_template: str | None = None
    """Jinja text (or a path to it) over the row's columns: makes the prompt."""
    as_chat: bool = False
    """Put prompts into the model's chat template, as the one message of a user."""
    error_column: str = "error"
    """Column that says why a row has no answer; null where it has one."""
    sampling_params: SharedParams = Field(default_factory=dict)
    """Sampling parameters of every row, over the model's generation_config."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra variables of the chat template."""

    batch_size: int | None = Field(default=None, ge=1)
    """Rows of one block. A block leaves when its last row is finished; meanwhile other blocks fill the engine. None: a
    quarter of the engine's max_num_seqs, at least 32: Ray Data takes two blocks of a task at a time, a few times a
    second."""
    max_open_rows: int | None = Field(default=None, ge=1)
    """Rows in blocks that one engine's actor holds at once. None: 16 for each of the engine's max_num_seqs."""
    replicas: int = Field(default=1, ge=1)
    """Engines, each in an actor of its own; Ray Data gives blocks to the one that has fewest."""
    max_restarts: int = Field(default=12, ge=0)
    """Deaths of an engine in a row, with no row answered in between, after which the pipeline fails."""
    idle_s: float = Field(default=300.0, gt=0)
    """Seconds without a row after which an engine gives back its GPUs; it starts again with the next row. Where a later
    stage fails, Ray Data may keep the engine's actor until the Ray job ends: this is how the GPUs come free."""
    solo_deaths: int = Field(default=3, ge=1)
    """Times an engine must die with a row alone in it before that row gets an error."""

    @property
    def columns(self) -> list[str] | None:
        """All columns are kept."""
        return None

    @property
    def token_ids(self) -> bool:
        """Token ids are in the output."""
        return True

    @model_validator(mode="after")
    def _named(self) -> ProcessorConfig:
        for name in ("prompt_column", "messages_column", "sampling_column", "error_column"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name a column, got an empty string")
        return self

    def block_rows(self, max_num_seqs: int) -> int:
        """Rows of one block."""
        return self.batch_size or max(_LEAST_ROWS, max_num_seqs // _BLOCKS_OF_SLOTS)

    def open_blocks(self, max_num_seqs: int) -> int:
        """Blocks that an actor holds at once."""
        rows = self.max_open_rows or _OPEN_FACTOR * max_num_seqs
        return min(_MOST_BLOCKS, max(2, -(-rows // self.block_rows(max_num_seqs))))


def make_processor_config(config: ProcessorConfig | Mapping[str, Any]) -> ProcessorConfig:
    """ProcessorConfig from a mapping; `engine` in it may be a mapping too. ValueError names every wrong field."""
    if isinstance(config, ProcessorConfig):
        return config
    data = dict(config)
    engine = data.get("engine")
    if isinstance(engine, Mapping):
        if "model" not in engine:
            raise ValueError("engine: model is missing: name a folder, a .gguf file or a hub id")
        data["engine"] = make_config(**engine)
    try:
        return ProcessorConfig(**data)
    except ValidationError as error:
        said = "; ".join(map(_say, error.errors()))
        raise ValueError(f"invalid processor config: {said}") from None


def _say(error: Any) -> str:
    where, message = ".".join(map(str, error["loc"])), str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
