"""Shoal: offline LLM inference on Ray.

Names are imported when first used (PEP 562), so that `import shoal` is quick and brings neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.driver.chat import ChatTemplateError
    from shoal.driver.config import EngineConfig
    from shoal.driver.inputs import PromptType, TextPrompt, TokensPrompt
    from shoal.driver.llm import LLM
    from shoal.driver.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        Logprob,
        RequestOutput,
    )
    from shoal.driver.params import BeamSearchParams, SamplingParams
    from shoal.driver.request import RequestStateStats

_HOME = {
    "LLM": "llm",
    "BeamSearchOutput": "outputs",
    "BeamSearchParams": "params",
    "BeamSearchSequence": "outputs",
    "ChatTemplateError": "chat",
    "CompletionOutput": "outputs",
    "EngineConfig": "config",
    "Logprob": "outputs",
    "PromptType": "inputs",
    "RequestOutput": "outputs",
    "RequestStateStats": "request",
    "SamplingParams": "params",
    "TextPrompt": "inputs",
    "TokensPrompt": "inputs",
}

__all__ = [  # noqa: RUF022 -- as sorted() has it
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ChatTemplateError",
    "CompletionOutput",
    "EngineConfig",
    "LLM",
    "Logprob",
    "PromptType",
    "RequestOutput",
    "RequestStateStats",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    value = getattr(import_module(f"shoal.driver.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("shoal")
    except PackageNotFoundError:  # used from a source tree that is not installed
        import tomllib
        from pathlib import Path

        project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())
        return str(project["project"]["version"])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
