"""From what the user names to what the engine needs: the config, the spec, the weights' place, dtype and tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.workers.config import LoadConfig
from shoal.workers.loading.files import CONFIG_FILE
from shoal.workers.loading.hub import ensure_files, hub_token, invalid_model, is_commit

if TYPE_CHECKING:
    from shoal.driver.config import EngineConfig
    from shoal.workers.models.spec import ModelSpec

GENERATION_FILE = "generation_config.json"
DTYPES = {
    "float32": "float32",
    "float": "float32",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
}


@dataclass(frozen=True)
class ResolvedModel:
    """A model that was found and understood."""

    spec: ModelSpec
    hf_config: Any  # a transformers PretrainedConfig, hf_overrides applied
    generation_config: dict[str, Any]  # defaults of sampling parameters that come with the model
    load: LoadConfig
    local_path: str  # the folder with config and tokenizer, or the .gguf file

    @property
    def from_gguf(self) -> bool:
        """Whether the model is one .gguf file."""
        return Path(self.local_path).is_file()


def resolve_model(config: EngineConfig) -> ResolvedModel:
    """Find the model, read its config, apply hf_overrides and look up its architecture.

    Raises ValueError: not a folder, file or hub repository; no or broken config.json; an architecture that is missing
    or unknown; overrides that do not fit.
    """
    from shoal.workers.models.spec import ModelSpec

    path = ensure_files(
        config.model, config.revision, config.hf_token, config.download_dir, "config", code=config.trust_remote_code
    ).absolute()
    load = LoadConfig(
        # A hub model is named to the ranks by id and commit: each node fetches its own copy, all of the same version.
        model=config.model if is_commit(path) else str(path),
        load_format=config.load_format,
        revision=is_commit(path) or config.revision,
        hf_token=config.hf_token or (hub_token() if is_commit(path) else None),
        download_dir=config.download_dir,
        seed=config.seed,
    )
    if path.is_file():
        load = replace(load, load_format=_gguf_load_format(config))
        hf_config = _read_gguf_config(path, config.hf_overrides)
    else:
        hf_config = _read_config(path, config)
    return ResolvedModel(
        spec=ModelSpec.from_hf(hf_config),
        hf_config=hf_config,
        generation_config=_generation_config(path, config),
        load=load,
        local_path=str(path),
    )


def resolve_dtype(requested: str, spec: ModelSpec, device: str, from_gguf: bool) -> str:
    """The dtype of weights and activations: "float32", "float16" or "bfloat16".

    "auto" is the checkpoint's own; where that is float32, or nothing is stated (always so for GGUF), bfloat16 on a GPU
    and float32 on a CPU. Raises ValueError for a name that is no dtype, or a checkpoint of another kind.
    """
    if requested != "auto":
        if requested not in DTYPES:
            raise ValueError(f"dtype must be 'auto' or one of {sorted(DTYPES)}, got {requested!r}")
        return DTYPES[requested]
    stated = None if from_gguf else spec.checkpoint_dtype
    if stated in (None, "float32", "float", "float64"):
        return "float32" if device == "cpu" else "bfloat16"
    if stated not in DTYPES:
        raise ValueError(f"the checkpoint's dtype is {stated!r}: choose one with dtype= ({', '.join(sorted(DTYPES))})")
    return DTYPES[stated]


def load_tokenizer(config: EngineConfig, model: ResolvedModel) -> Any:
    """The model's transformers tokenizer (or `config.tokenizer`'s), None with skip_tokenizer_init.

    From a .gguf file everything comes from its metadata, chat template included. Raises ValueError when there is none.
    """
    if config.skip_tokenizer_init:
        return None
    path = Path(model.local_path)
    if config.tokenizer is not None or config.tokenizer_revision is not None:
        name = os.path.expanduser(config.tokenizer or config.model)
        revision = config.tokenizer_revision or config.revision
        path = ensure_files(
            name, revision, config.hf_token, config.download_dir, "config", code=config.trust_remote_code
        )
    if path.suffix.lower() == ".gguf":
        from shoal.driver.gguf_tokenizer import tokenizer_from_gguf
        from shoal.workers.loading.gguf_file import read_gguf

        return tokenizer_from_gguf(read_gguf(path))

    from transformers import AutoTokenizer

    if path.is_file():
        path = path.parent
    try:
        return AutoTokenizer.from_pretrained(
            str(path), use_fast=config.tokenizer_mode != "slow", trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers raises anything from OSError to AttributeError for a broken tokenizer
        own_code = not config.trust_remote_code and "trust_remote_code" in str(error)
        why = "it comes with code of its own, which runs only with trust_remote_code=True" if own_code else None
        raise ValueError(
            f"cannot load a tokenizer from {path}: {why or _first_line(error)}. Give tokenizer= a folder or hub id "
            "that has one, or skip_tokenizer_init=True to pass token ids."
        ) from error


def resolve_all(config: EngineConfig) -> tuple[ResolvedModel, Any, str | None]:
    """(model, tokenizer or None, its fast backend as JSON or None)."""
    model = resolve_model(config)
    tokenizer = load_tokenizer(config, model)
    return model, tokenizer, None if tokenizer is None else serialized_tokenizer(tokenizer)


def serialized_tokenizer(tokenizer: Any) -> str | None:
    """The fast tokenizer as JSON, for `tokenizers.Tokenizer.from_str`; None when it has no fast backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str())


def _gguf_load_format(config: EngineConfig) -> str:
    if not config.model.lower().endswith(".gguf"):
        raise invalid_model(config.model, "it is a file, and not a .gguf one")
    if config.load_format not in ("auto", "gguf", "dummy"):
        raise ValueError(f"load_format {config.load_format!r} cannot read {config.model!r}: use 'auto' or 'gguf'")
    return "dummy" if config.load_format == "dummy" else "gguf"


def _read_gguf_config(path: Path, overrides: Any) -> Any:
    from shoal.driver.gguf_model import config_from_gguf
    from shoal.workers.loading.gguf_file import read_gguf

    return _build_config(config_from_gguf(read_gguf(path)), overrides, str(path))


def _read_config(folder: Path, config: EngineConfig) -> Any:
    """config.json of a folder, overrides applied."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise invalid_model(config.model, f"no {CONFIG_FILE} was found in {folder}")
    raw = _read_json(file)
    if config.trust_remote_code and "AutoConfig" in raw.get("auto_map", {}):
        from transformers import AutoConfig

        built = AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
        if isinstance(config.hf_overrides, dict):
            _update(built, config.hf_overrides)
        return _finish(built, config.hf_overrides)
    return _build_config(raw, config.hf_overrides, str(file))


def _build_config(raw: dict[str, Any], overrides: Any, source: str) -> Any:
    """A transformers config from a config.json's content.

    Overrides given as a dict are laid into the content, not set on the finished object, so that what a config class
    derives (head_dim, layer_types, rope_parameters) follows them.
    """
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    changes = overrides if isinstance(overrides, Mapping) else {}
    model_type = changes.get("model_type", raw.get("model_type"))
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    # Without a class of its own a config still carries its numbers, and hf_overrides may name the architecture.
    cls = CONFIG_MAPPING[model_type] if known else PretrainedConfig
    merged = _merge(raw, changes, cls)
    try:
        built = cls.from_dict(merged)
    except Exception as error:  # config classes validate in many ways, with their own exception types
        said = " with hf_overrides" if changes else ""
        raise ValueError(f"{source}{said} is no valid config: {' '.join(str(error).split())}") from error
    if not known:
        built.model_type = model_type or ""
    return _finish(built, overrides)


def _finish(built: Any, overrides: Any) -> Any:
    """Apply overrides that are a function, and name the architecture where the config does not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if callable(overrides):
        built = overrides(built)
        if built is None:
            raise ValueError("hf_overrides is a function that returned None: it must return the config")
    if not getattr(built, "architectures", None):
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(built, "model_type", ""))
        if name is not None:
            built.architectures = [name]
    return built


def _merge(raw: Mapping[str, Any], changes: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """`raw` with `changes` laid over: nested configs key by key, anything else whole."""
    merged = dict(raw)
    aliases: dict[str, str] = getattr(cls, "attribute_map", {})
    nested: dict[str, Any] = getattr(cls, "sub_configs", {})
    for key, value in changes.items():
        name = aliases.get(key, key)  # GPT-2's file says n_layer where everybody says num_hidden_layers
        for other in [alias for alias, target in aliases.items() if target == name]:
            merged.pop(other, None)
        inner = merged.get(name)
        if isinstance(value, Mapping) and (name in nested or (isinstance(inner, Mapping) and _is_config(name))):
            merged[name] = _merge(inner or {}, value, nested.get(name))
        else:
            merged[name] = dict(value) if isinstance(value, Mapping) else value
    rope = merged.get("rope_parameters")
    if "rope_theta" in changes and "rope_parameters" not in changes and isinstance(rope, Mapping):
        merged["rope_parameters"] = {**rope, "rope_theta": changes["rope_theta"]}
    return merged


def _is_config(name: str) -> bool:
    return name.endswith("_config") and name != "quantization_config"


def _update(config: Any, changes: Mapping[str, Any]) -> None:
    """Overrides on a finished config, for classes that come as remote code."""
    from transformers import PretrainedConfig

    for key, value in changes.items():
        inner = getattr(config, key, None)
        if isinstance(value, Mapping) and isinstance(inner, PretrainedConfig):
            _update(inner, value)
        else:
            setattr(config, key, value)


def _generation_config(path: Path, config: EngineConfig) -> dict[str, Any]:
    """generation_config.json as `config.generation_config` chooses it, with override_generation_config laid over."""
    choice = config.generation_config
    found: dict[str, Any] = {}
    if choice == "auto":
        file = path / GENERATION_FILE
        found = _read_json(file) if path.is_dir() and file.is_file() else {}
    elif choice not in ("vllm", "shoal"):
        file = Path(choice).expanduser() / GENERATION_FILE
        if not file.is_file():
            raise ValueError(
                f"generation_config must be 'auto', 'vllm', 'shoal' or a folder that holds {GENERATION_FILE}, "
                f"got {choice!r}: {file} does not exist"
            )
        found = _read_json(file)
    kept = {key: value for key, value in found.items() if key not in ("transformers_version", "_from_model_config")}
    return {**kept, **config.override_generation_config}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object but a {type(content).__name__}")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
