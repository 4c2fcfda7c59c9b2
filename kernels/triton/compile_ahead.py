"""Compiling kernels before they are needed, many at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

_MOST_THREADS = 16
_compiling = ContextVar("compiling", default=False)


def is_compiling() -> bool:
    """Inside `compiling_only`: what larger steps than this one launch should be launched too."""
    return _compiling.get()


@contextmanager
def compiling_only() -> Iterator[None]:
    """Inside, kernels that this thread launches are compiled (or found in Triton's cache) and do not run.

    At the end all are ready. What launches would have written stays as it was, so nothing may depend on it.
    """
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, **options: Any) -> Any:
        return run(kernel, *args, **options | {"warmup": True})

    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    with (
        ThreadPoolExecutor(threads) as executor,
        AsyncCompileMode(executor),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)
