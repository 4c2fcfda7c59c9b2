"""Model families by the name in a config's `architectures`. Free of torch: classes are imported when asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.workers.models.base import Model

MODELS: dict[str, str] = {
    "GPT2LMHeadModel": "shoal.workers.models.gpt2:GPT2LMHeadModel",
    "GraniteForCausalLM": "shoal.workers.models.granite:GraniteForCausalLM",
    "LlamaForCausalLM": "shoal.workers.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "shoal.workers.models.llama:LlamaForCausalLM",
    "OPTForCausalLM": "shoal.workers.models.opt:OPTForCausalLM",
    "Qwen3ForCausalLM": "shoal.workers.models.qwen3:Qwen3ForCausalLM",
}


def register_model(architecture: str, target: str) -> None:
    """Add or replace a family: `target` is "module:Class", imported by the workers (never by the driver).

    The class is built like the ones here: shoal.workers.models.base.Model.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"register_model: target must look like 'package.module:Class', got {target!r}")
    MODELS[architecture] = target


def resolve_architecture(architectures: Sequence[str] | None, *, model_type: str = "") -> str:
    """The first of a config's architectures that is known; ValueError that shows the override to write otherwise."""
    found = [architectures] if isinstance(architectures, str) else list(architectures or ())
    for name in found:
        if name in MODELS:
            return name
    if not found:
        guess = _nearest(model_type) or ["GPT2LMHeadModel"]
        raise ValueError(
            "No model architectures are specified: the config has no `architectures`"
            + (f" (its model_type is {model_type!r})" if model_type else "")
            + f". Name one with {_override(guess[0])}. Known: {', '.join(sorted(MODELS))}"
        )
    near = _nearest(*found, model_type)
    raise ValueError(
        f"Model architectures {found} are not supported."
        + (f" Nearest known: {', '.join(near)}." if near else "")
        + f" If the model is one of the known ones, say so with {_override((near or ['LlamaForCausalLM'])[0])}."
        + f" Known: {', '.join(sorted(MODELS))}"
    )


def load_model_class(architecture: str) -> type[Model]:
    """Import the class of a known architecture, or of a "module:Class" (ModelSpec.model_class). This imports torch."""
    target = architecture if ":" in architecture else MODELS[resolve_architecture([architecture])]
    module, _, name = target.partition(":")
    cls: type[Model] = getattr(importlib.import_module(module), name)
    return cls


def _nearest(*names: str) -> list[str]:
    lowered = {name.lower(): name for name in MODELS}
    near: list[str] = []
    for name in filter(None, names):
        # A model_type ("gpt2") is a prefix of its architecture and too short for difflib.
        starts = [known for low, known in lowered.items() if low.startswith(name.lower().replace("_", ""))]
        close = [lowered[low] for low in difflib.get_close_matches(name.lower(), lowered, 3, 0.5)]
        near += [known for known in starts + close if known not in near]
    return near[:3]


def _override(architecture: str) -> str:
    return f'hf_overrides={{"architectures": ["{architecture}"]}}'
