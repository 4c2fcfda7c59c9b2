"""Which files of a folder, or of a hub repository, are the weights."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shoal.workers.config import LoadConfig

CONFIG_FILE = "config.json"

# Tiers of file names, best first: the first tier with a match is the checkpoint. An index names its own files.
TIERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "safetensors": (("*.safetensors.index.json",), ("model.safetensors",), ("model*.safetensors",), ("*.safetensors",)),
    "pt": (("*.bin.index.json",), ("pytorch_model.bin",), ("pytorch_model*.bin",), ("*.bin", "*.pt")),
}
# Files with those endings that are no weights of the model: adapters, Mistral's own naming, a trainer's state.
NOT_WEIGHTS = ("adapter_*", "consolidated*", "optimizer*", "scheduler*", "training_args*", "rng_state*", "scaler*")

_SHARD = re.compile(r"-\d+-of-(\d+)\.")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of one checkpoint. `weight_map`: tensor name -> file name, where an index says so."""

    paths: tuple[Path, ...]
    weight_map: dict[str, str] | None = None
    index: Path | None = None


def match_tier(names: Iterable[str], tier: Sequence[str]) -> list[str]:
    """Names at the top of a folder that this tier takes, sorted."""
    return sorted(
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in tier)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_WEIGHTS)
    )


def formats_tried(load_format: str) -> tuple[str, ...]:
    """Folder formats that a load_format allows, best first."""
    return tuple(TIERS) if load_format == "auto" else (load_format,)


def find_weights(folder: Path, load_format: str) -> WeightFiles:
    """The files of one format in a local folder.

    Raises RuntimeError when there are none, ValueError when the set is incomplete (the missing file is named).
    """
    names = _names(folder)
    for tier in TIERS[load_format]:
        found = match_tier(names, tier)
        if found and found[0].endswith(".index.json"):
            return _indexed(folder, folder / found[0])
        if found:
            _check_shards(folder, found)
            return WeightFiles(tuple(folder / name for name in found))
    raise no_weights(str(folder), load_format)


def pick_format(load: LoadConfig) -> LoadConfig:
    """`load` with `model` a local path (weights fetched from the hub if need be) and a decided load_format."""
    from shoal.workers.loading.hub import ensure_files

    path = Path(load.model).expanduser()
    if path.is_file():
        if load.load_format not in ("auto", "gguf") or path.suffix.lower() != ".gguf":
            raise ValueError(
                f"model {load.model!r} is a single file: only a .gguf file can be one "
                f"(load_format 'auto' or 'gguf', got {load.load_format!r}); else name its folder"
            )
        return replace(load, model=str(path), load_format="gguf")
    if load.load_format == "gguf":
        raise ValueError(f"load_format 'gguf' takes one .gguf file, got model {load.model!r}; give the file's own path")
    folder = ensure_files(
        load.model, load.revision, load.hf_token, load.download_dir, "weights", load_format=load.load_format
    )
    names = _names(folder)
    for form in formats_tried(load.load_format):
        if any(match_tier(names, tier) for tier in TIERS.get(form, ())):
            return replace(load, model=str(folder), load_format=form)
    if load.load_format not in ("auto", *TIERS):  # a format from outside Shoal finds its files itself
        return replace(load, model=str(folder))
    raise no_weights(load.model, load.load_format)


def no_weights(model: str, load_format: str) -> RuntimeError:
    """The error for a model without weights: what was looked for, and what helps."""
    wanted = [pattern for form in formats_tried(load_format) for tier in TIERS.get(form, ()) for pattern in tier]
    return RuntimeError(
        f"Cannot find any model weights with `{model}` (load_format {load_format!r}): "
        f"looked for {', '.join(wanted)}. Point `model` at the folder that holds them, at one .gguf file, "
        "or use load_format='dummy' for random weights."
    )


def read_index(path: Path) -> dict[str, str]:
    """weight_map of an index file: tensor name -> file name. ValueError naming the file when it has none."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("weight_map is not a filled object")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no valid weight index: {error!r}") from error
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:  # an index must not lead out of its folder
            raise ValueError(f"{path} names a file outside its folder: {name!r}")
    return weight_map


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []


def _indexed(folder: Path, index: Path) -> WeightFiles:
    weight_map = read_index(index)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
    return WeightFiles(tuple(folder / name for name in files), weight_map, index)


def _check_shards(folder: Path, names: list[str]) -> None:
    """Shards without an index: "-00001-of-00003" says how many there must be."""
    for name in names:
        match = _SHARD.search(name)
        if match and len(names) < int(match[1]):
            raise ValueError(
                f"{folder} holds {len(names)} of {int(match[1])} weight files and no index: {', '.join(names)}"
            )
