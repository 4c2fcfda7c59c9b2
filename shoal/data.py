"""shoal.data: answers as a step of a Ray Data pipeline. See docs/ray_data.md.

Names are imported when first used, so that `import shoal.data` brings neither Ray nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.driver.data.config import ProcessorConfig
    from shoal.driver.data.generate import Generate
    from shoal.driver.data.processor import build_processor

_HOME = {"Generate": "generate", "ProcessorConfig": "config", "build_processor": "processor"}

__all__ = ["Generate", "ProcessorConfig", "build_processor"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'shoal.data' has no attribute {name!r}")
    value = getattr(import_module(f"shoal.driver.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
