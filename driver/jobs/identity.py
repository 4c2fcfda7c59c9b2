"""What a job is: the model, the parameters and the input its rows were answered with. An earlier run must match."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.files import InputFile, filesystem_of
from shoal.driver.local_files import read_template

if TYPE_CHECKING:
    from shoal.driver.model_config import ResolvedModel

JOB_FILE = "job.json"  # of the state: what the job is
# What an answer, or the row that holds it, depends on.
_ENGINE_FIELDS = (
    "tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init", "dtype", "kv_cache_dtype", "seed",
    "generation_config", "override_generation_config", "max_model_len", "load_format",
)  # fmt: skip
_JOB_FIELDS = (
    "id_column", "prompt_column", "messages_column", "sampling_column", "as_chat", "columns", "token_ids",
    "sampling_params", "chat_template_kwargs", "strict_model",
)  # fmt: skip
_SHOWN = 80


def job_identity(config: JobConfig, form: str, files: Sequence[InputFile], model: ResolvedModel) -> dict[str, Any]:
    """Everything that must stay the same, as plain JSON."""
    engine = config.engine
    parameters = {name: getattr(engine, name) for name in _ENGINE_FIELDS}
    parameters |= {name: getattr(config, name) for name in _JOB_FIELDS}
    parameters["form"] = form
    parameters["prompt_template"] = _text("prompt_template", config.prompt_template, engine.allowed_local_path)
    parameters["chat_template"] = _text("chat_template", engine.chat_template, engine.allowed_local_path)
    parameters["hf_overrides"] = (
        engine.hf_overrides if isinstance(engine.hf_overrides, dict) else repr(engine.hf_overrides)
    )
    parameters["logits_processors"] = [getattr(one, "__qualname__", str(one)) for one in engine.logits_processors]
    identity = {
        "model": _model_identity(config, model),
        "parameters": parameters,
        "input": [file.identity() for file in files],
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def salt(identity: dict[str, Any]) -> bytes:
    """What goes into every row's key."""
    parts = {"model": identity["model"], "parameters": identity["parameters"]}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).digest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed, for people."""
    found: list[str] = []
    for name in sorted(before["parameters"].keys() | now["parameters"].keys()):
        was, is_ = before["parameters"].get(name), now["parameters"].get(name)
        if was != is_:
            found.append(f"{name} was {was!r:.{_SHOWN}}, is {is_!r:.{_SHOWN}}")
    old, new = before["model"], now["model"]
    if old["name"] != new["name"]:
        found.append(f"the model was {old['name']}, is {new['name']}")
    elif old != new:
        found.append("the model's files or revision changed")
    found += _input_differences(before["input"], now["input"])
    return found


def _input_differences(before: list[Any], now: list[Any]) -> Iterator[str]:
    old, new = ({name: rest for name, *rest in files} for files in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"input file {name} is gone"
        elif name not in old:
            yield f"input file {name} is new"
        elif old[name] != new[name]:
            size = f" ({old[name][0]} bytes, now {new[name][0]})" if old[name][0] != new[name][0] else ""
            yield f"input file {name} changed{size}"
    if [file[0] for file in before] != [file[0] for file in now] and old.keys() == new.keys():
        yield "the input files come in another order"


def _model_identity(config: JobConfig, model: ResolvedModel) -> dict[str, Any]:
    """A hub model's commit; of local files, names, sizes and what both ends of each hold."""
    path = model.local_path
    if model.load.model == config.engine.model and model.load.revision:
        return {"name": config.engine.model, "revision": model.load.revision}
    filesystem, _ = filesystem_of(path)
    names = [path] if os.path.isfile(path) else sorted(e.path for e in os.scandir(path) if e.is_file())
    files = [InputFile(filesystem, name, os.path.basename(name), os.path.getsize(name), "") for name in names]
    return {"name": config.engine.model, "files": [file.identity() for file in files]}


def _text(field: str, text_or_path: str | None, allowed_folder: str | None) -> str | None:
    """A template counts by its text, wherever it came from."""
    if text_or_path is None or not os.path.isfile(os.path.expanduser(text_or_path)):
        return text_or_path
    return read_template(field, text_or_path, allowed_folder)
