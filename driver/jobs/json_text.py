"""Rows and records as JSON text: always valid, on one line, whatever is in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson


def dump(value: Any) -> bytes:
    """One line of JSON. Text that is no Unicode is escaped, numbers that are none are null."""
    try:
        return orjson.dumps(value)
    except TypeError:  # surrogates, whole numbers beyond 64 bits, keys that are no text: the standard library's
        return _dump_anything(value)


def load_all(texts: Sequence[bytes]) -> list[dict[str, Any]]:
    """Objects that `dump` has written, in one go."""
    found: list[dict[str, Any]]
    try:
        found = orjson.loads(b"[" + b",".join(texts) + b"]")
    except orjson.JSONDecodeError:  # surrogates
        found = [json.loads(text) for text in texts]
    return found


def _dump_anything(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
