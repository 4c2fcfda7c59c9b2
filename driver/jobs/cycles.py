"""Python's search for cycles of garbage, kept from looking through millions of living objects again and again.

Rows are freed by their reference counts. What imports, Ray and tokenizers left lives until the process ends.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_NEW_OBJECTS = 20_000  # more objects than this must have come than gone before the new ones are looked through
_ROUNDS = (10, 20)  # how many such looks make one at middle-aged objects, and of those one at all


@contextlib.contextmanager
def rare_search() -> Iterator[None]:
    """For as long as it is entered. What is there already is left out of every search.

    Garbage goes first: a pipeline that failed in this process leaves a cycle that holds its actors, and their CPUs.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *_ROUNDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
