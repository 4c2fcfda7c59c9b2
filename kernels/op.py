"""Op: one tensor operation with a torch reference that defines it and any number of faster implementations."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "reference"


class Op(Generic[P, R]):
    """A callable with its reference's signature.

    `implementations` is a literal table of lazy names, {"triton": "shoal.kernels.triton.rms_norm:rms_norm"}; an
    implementation must agree with the reference on every entry of `cases()` within `tolerance` (absolute, float32).
    `cases(device)` yields argument tuples of small, odd shapes, made anew at each call.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        *,
        cases: Callable[[str], Iterable[tuple[Any, ...]]],
        implementations: Mapping[str, str] | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.implementations = dict(implementations or {})
        self.tolerance = tolerance
        self._cases = cases
        self._active = reference
        self.active_name = REFERENCE
        self.__doc__ = reference.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._active(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Op({self.name!r}, using={self.active_name!r})"

    def cases(self, device: str = "cpu") -> list[tuple[Any, ...]]:
        """Argument tuples for the reference and every implementation."""
        return list(self._cases(device))

    def get(self, name: str) -> Callable[P, R]:
        """The implementation of that name ("reference" included); ValueError for an unknown one."""
        if name == REFERENCE:
            return self.reference
        if name not in self.implementations:
            known = [REFERENCE, *self.implementations]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"op {self.name!r} has no implementation {name!r}, known: {', '.join(known)}{hint}")
        module, _, function = self.implementations[name].partition(":")
        return cast("Callable[P, R]", getattr(importlib.import_module(module), function))

    def use(self, name: str) -> None:
        """From now on calls run this implementation. Meant for start-up, before graphs are recorded."""
        self._active = self.get(name)
        self.active_name = name
