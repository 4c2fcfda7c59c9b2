"""JobConfig: what a batch job is told, from a YAML file or from flags. Every flag of `shoal run-batch` is a field."""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shoal.driver.config import Count, EngineConfig, check_count, got, make_config
from shoal.driver.params import check_shared
from shoal.driver.secrecy import GIVE_TOKEN

MIB = 1 << 20
_SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet"}
# Engine arguments that do nothing where rows come from a table, and what to do instead. Refused, never ignored.
USELESS = {
    "max_solo_deaths": "rows are put aside by solo_deaths, of the job or the processor; give that",
    "enable_sleep_mode": "nobody can call sleep() here; an engine gives everything back when its rows are done",
    "scheduling_policy": "rows have no priority here: leave it at 'fcfs', and put the rows that matter first",
}


def _useful(engine: EngineConfig) -> EngineConfig:
    for name, instead in USELESS.items():
        value, default = getattr(engine, name), EngineConfig.model_fields[name].default
        if value != default or (name == "max_solo_deaths" and name in engine.model_fields_set):
            raise ValueError(f"{name}={value!r} has no effect: {instead}")
    return engine


def _usable(values: dict[str, Any]) -> dict[str, Any]:
    check_shared(values)
    return values


# Fields of whatever answers a table: an engine without arguments of USELESS, and parameters of all rows.
TableEngine = Annotated[EngineConfig, AfterValidator(_useful)]
SharedParams = Annotated[dict[str, Any], AfterValidator(_usable)]


class JobConfig(BaseModel):
    """One batch job. None means: found out from the input, the output or the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True)

    input: list[str] = Field(min_length=1)
    """Files, folders or globs: local paths, or any address that fsspec or pyarrow opens (s3://, gs://, hf://, ...)."""
    output: str
    """NAME.jsonl or NAME.parquet: one file, published at the end. NAME/: a folder, published in parts."""
    engine: TableEngine
    """Engine arguments, as in LLM(...); `model` is one of them."""

    input_format: Literal["auto", "jsonl", "parquet", "csv"] = "auto"
    """auto: by the name's ending."""
    form: Literal["auto", "rows", "openai"] = "auto"
    """rows: a prompt or messages column; openai: batch lines with custom_id, url and body. auto: by the first row."""
    output_format: Literal["auto", "jsonl", "parquet"] = "auto"
    """auto: by the name's ending; a folder gets what the input is, JSONL for CSV."""
    error_output: str | None = None
    """File for rows that ended in an error. None: NAME.errors.jsonl for OpenAI's form, else the output itself."""
    order: Literal["input", "completion"] = "input"
    """Of the rows in the output."""
    rows_per_part: int = Field(default=10_000, ge=1)
    """Input rows that one part of a folder output covers."""

    id_column: str | None = None
    """Column with a unique id of each row. None: `id` or `custom_id` where rows have it, else file and row number."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of token ids."""
    messages_column: str = "messages"
    """Column with a conversation; used where a row has no prompt."""
    sampling_column: str = "sampling_params"
    """Column with a row's own sampling parameters, over those of the job."""
    prompt_template: str | None = None
    """Jinja text (or a path to it) over the row's columns: makes the prompt."""
    as_chat: bool = False
    """Put prompts into the model's chat template, as the one message of a user."""
    columns: list[str] | None = None
    """Columns of the input that the output keeps. None: all."""
    token_ids: bool = False
    """Write prompt and output token ids too."""
    sampling_params: SharedParams = Field(default_factory=dict)
    """Sampling parameters of every row, over the model's generation_config."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra variables of the chat template."""
    strict_model: bool = False
    """A row whose body names another model than the job's is an error; otherwise the name is only recorded."""

    on_invalid: Literal["stop", "continue"] = "stop"
    """What a bad line, a duplicate id or a missing column means: the job ends before it takes a GPU, or a row error."""
    validate_rows: int = Field(default=1_000_000, ge=0)
    """Rows looked at before the engine starts; what is wrong in those after them is a row error."""
    max_line_bytes: int = Field(default=10 * MIB, ge=1)
    """Longest line of JSONL or CSV."""
    max_errors: str | None = None
    """N or P%: end the job as failed once more rows than that ended in an error."""

    replicas: Count = 1
    """Engines that share the rows; auto: as many as the cluster has room for, at any time."""
    max_restarts: int = Field(default=12, ge=0)
    """Deaths of engines, or of their ranks, in a row with no row answered in between, after which the job fails."""
    solo_deaths: int = Field(default=3, ge=1)
    """Times an engine must die with a row alone in it before that row is put aside as an error."""
    drain_s: float | None = Field(default=None, ge=0)
    """Seconds that rows at work get to finish after a stop. None: 30 after Ctrl-C; after SIGTERM a second less than
    RAY_JOB_STOP_WAIT_TIME_S (3 unless set)."""
    fresh: bool = False
    """Forget what an earlier run of this output has done."""
    retry_errors: bool = False
    """Try rows again that an earlier run of this output ended with an error."""
    accept_changes: bool = False
    """Go on although input, model or parameters changed: rows that changed are computed again, others are kept."""

    commit_rows: int = Field(default=64, ge=1)
    """Answers after which they are made durable, up to 50 times a second; a tenth of a second does it too."""
    object_rows: int = Field(default=2_000, ge=1)
    """Answers in one ledger object, on stores that cannot append."""
    object_seconds: float = Field(default=10.0, gt=0)
    """Oldest an answer gets before its object is written, on such stores."""
    progress_s: float = Field(default=5.0, gt=0)
    """Seconds between lines of progress in a log; a terminal gets a bar."""

    @field_validator("replicas", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return check_count(value)

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("max_errors", mode="before")
    @classmethod
    def _threshold(cls, value: Any) -> Any:
        if value is None:
            return None
        text = str(value).strip()
        number = text.removesuffix("%").strip()
        try:
            share = float(number)
            wrong = not 0 <= share < math.inf or (not text.endswith("%") and not number.isdigit())
        except ValueError:
            wrong = True
        if wrong:
            raise ValueError(f"max_errors must be a number of rows (10) or a share (2.5%), got {value!r}")
        return text

    @model_validator(mode="after")
    def _whole(self) -> JobConfig:
        if not self.output.strip():
            raise ValueError("output must name a file or a folder, got an empty string")
        for name in ("prompt_column", "messages_column", "sampling_column"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name a column, got an empty string")
        if not self.is_folder and self.output_format == "auto" and suffix(self.output) is None:
            raise ValueError(
                f"output must end in {', '.join(_SUFFIXES)} or /, got {self.output!r}; or set output_format"
            )
        return self

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder of parts."""
        return self.output.endswith("/") or (os.path.isdir(self.output) and suffix(self.output) is None)

    def error_limit(self, num_rows: int) -> float:
        """Rows that may end in an error, of `num_rows` read so far."""
        if self.max_errors is None:
            return float("inf")
        if self.max_errors.endswith("%"):
            return float(self.max_errors.rstrip("% ")) / 100 * num_rows
        return int(self.max_errors)


def suffix(address: str) -> str | None:
    """The format that an address's ending names, a compression's ending left out."""
    base = address.rstrip("/").rsplit("/", 1)[-1]
    return next((kind for ending, kind in _SUFFIXES.items() if base.endswith(ending)), None)


def make_job(arguments: dict[str, Any]) -> JobConfig:
    """JobConfig from a mapping; `engine` in it is a mapping too. ValueError names every wrong field, short."""
    data = dict(arguments)
    engine = data.get("engine")
    if isinstance(engine, dict):
        if "model" not in engine:
            raise ValueError("engine: model is missing: name a folder, a .gguf file or a hub id")
        data["engine"] = make_config(**engine)
    try:
        return JobConfig(**data)
    except ValidationError as error:
        raise ValueError("invalid job: " + "; ".join(map(_say, error.errors()))) from None


def load_job(path: str, changes: dict[str, Any]) -> JobConfig:
    """The job of a YAML file, with `changes` laid over it (those of `engine` field by field)."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"job file {path!r} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"job file {path!r} must hold a mapping of fields, got {type(data).__name__}")
    engine = data.get("engine") or {}
    if not isinstance(engine, dict):
        raise ValueError(f"job file {path!r}: engine must hold a mapping of fields, got {type(engine).__name__}")
    if "hf_token" in engine:
        raise ValueError(
            f"job file {path!r}: engine.hf_token: a token does not belong in a file that travels; {GIVE_TOKEN}"
        )
    engine = {**engine, **changes.get("engine", {})}
    return make_job({**data, **changes, "engine": engine})


def _say(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["loc"] == ("engine",) else got(error)  # not all of its fields
    return f"{where}: {message}{given}" if where else message
