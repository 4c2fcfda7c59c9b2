"""Which rows at the beginning of an input need not be read again, found from the records of a ledger."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.driver.jobs.keys import HASH, id_hash
from shoal.driver.jobs.prefix import Position, PrefixFinder

EVENTS = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from(["ok", "err", "at"]), st.integers(0, 12)), max_size=60
)  # epoch, kind of record, row


@given(EVENTS, st.none() | st.integers(1, 3), st.booleans())
def test_all_before_a_position_that_is_settled_and_nothing_else(events, since, keep_errors):
    finder = PrefixFinder(since)
    values, positions = {}, [0]
    for location, (epoch, kind, row) in enumerate(sorted(events, key=lambda event: event[0])):
        counts = since is not None and epoch >= since
        assert finder.counts(epoch) == counts
        if not counts:
            continue
        if kind == "at":
            finder.position(Position(row, row // 5, row, 10 * row).record())
            positions.append(row)
        elif kind == "ok" or values.get(row, 1) & 1:  # no error comes after an answer
            values[row] = location << 1 | (kind == "err")
            finder.settled(np.array([row]), np.array([values[row]]), np.frombuffer(id_hash(f"r{row}"), HASH))
    settled = 0
    while settled in values and (keep_errors or not values[settled] & 1):
        settled += 1
    end = max(row for row in positions if row <= settled)
    found = finder.find(keep_errors)
    if not end:
        assert found is None
        return
    assert found.end == Position(end, end // 5, end, 10 * end)
    assert found.values.tolist() == [values[row] for row in range(end)]
    known = found.ids.find([id_hash(f"r{row}") for row in range(13)])
    assert np.flatnonzero(known >= 0).tolist() == list(range(end))
