"""The search for garbage while a job runs."""

from __future__ import annotations

import gc
import weakref

from shoal.driver.jobs.cycles import rare_search


class Holder:
    """Part of a cycle."""


def test_garbage_from_before_is_freed_not_kept():
    before = gc.get_threshold()
    gc.disable()
    try:
        one = Holder()
        one.itself = one
        there = weakref.ref(one)
        del one
        assert there() is not None
        with rare_search():
            assert there() is None
            assert gc.get_freeze_count() > 0
            assert gc.get_threshold() != before
        assert gc.get_freeze_count() == 0
        assert gc.get_threshold() == before
    finally:
        gc.enable()
