"""Reading weights: one row of LOADERS per format, and the two calls the rest of a worker uses.

Importing this package imports neither torch nor a reader; both come with the first call.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from shoal.workers.loading.files import pick_format

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from shoal.workers.config import LoadConfig
    from shoal.workers.loading.base import Loader, TensorSource

LOADERS: dict[str, str] = {
    "safetensors": "shoal.workers.loading.safetensors:SafetensorsLoader",
    "pt": "shoal.workers.loading.pytorch:PytorchLoader",
    "gguf": "shoal.workers.loading.gguf:GgufLoader",
    "dummy": "shoal.workers.loading.dummy:DummyLoader",
}
"""load_format -> "module:Loader class". Code outside Shoal adds a format by adding a row."""


def resolve_loader(load: LoadConfig) -> tuple[Loader, LoadConfig]:
    """The format's reader, and `load` with the model fetched (a local path) and the format decided.

    Raises ValueError for an unknown load_format, RuntimeError when `load.model` holds no weights.
    """
    if load.load_format != "auto" and load.load_format not in LOADERS:
        raise ValueError(f"load_format must be 'auto' or one of {sorted(LOADERS)}, got {load.load_format!r}")
    if load.load_format != "dummy":
        load = pick_format(load)
    module, _, name = LOADERS[load.load_format].partition(":")
    loader: Loader = getattr(importlib.import_module(module), name)()
    return loader, load


def iterate_weights(load: LoadConfig) -> Iterator[TensorSource]:
    """Every tensor of the checkpoint at `load.model`, unread; reads files (and the hub) as it goes.

    Raises RuntimeError when there are no weights, ValueError for a file that is corrupt or incomplete (named).
    """
    loader, load = resolve_loader(load)
    yield from loader.sources(load)


def load_weights(model: nn.Module, load: LoadConfig) -> None:
    """Fill `model` from `load.model` through `model.load_weights(sources)`; "dummy" fills it with random values.

    Raises as `iterate_weights` does, and whatever the model raises for tensors it lacks or does not know.
    """
    loader, load = resolve_loader(load)
    loader.load(model, load)
