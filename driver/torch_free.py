"""Transformers without torch, for processes that only read configs and tokenize: it imports torch where it can."""

from __future__ import annotations

import os
import sys

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def keep_torch_out() -> None:
    """Transformers takes torch for not installed, as long as this process lives; that saves seconds of imports.

    Only for a process that is Shoal's own: models of transformers do not work in it afterwards. torch itself can be
    imported as before. Does nothing where transformers or torch is there already.
    """
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    loud = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"  # it would tell of models that are not available
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python says that a module cannot be imported
    try:
        from transformers.utils import is_torch_available

        is_torch_available()  # it looks once and remembers
    finally:
        del sys.modules["torch"]
        if loud is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = loud
