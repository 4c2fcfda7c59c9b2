import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.driver.jobs.keys import KeyTable, Numbers, RowKeys, id_hash, stream_number


def test_keys_tell_rows_jobs_and_places_apart():
    keys = RowKeys(b"a")
    found = {
        keys.content(b"x"), keys.content(b"y"), RowKeys(b"b").content(b"x"),
        keys.place("f", 1, b"x"), keys.place("f", 2, b"x"), keys.place("g", 1, b"x"), keys.place("f", 1, b"y"),
    }  # fmt: skip
    assert len(found) == 7
    assert keys.content(b"x") == RowKeys(b"a").content(b"x")
    assert id_hash("\ud800") != id_hash("x")
    assert 0 <= stream_number("a") < 1 << 64


def key(i):
    return id_hash(str(i))


@pytest.mark.parametrize("count", [0, 10, 20_000, 70_000])
def test_tables(count):
    table = KeyTable(with_values=True)
    for i in range(count):
        table.add(key(i), i)
    assert len(table) == count
    asked = random.Random(1).sample(range(2 * count), min(2 * count, 5000))
    assert table.find([key(i) for i in asked]).tolist() == [i if i < count else -1 for i in asked]
    if count > 20_000:
        assert 0.7 * 20 * count < table.nbytes <= 20 * count


def test_keys_that_share_their_first_half():
    table = KeyTable(with_values=True)
    keys = [b"samehigh" + i.to_bytes(4, "little") for i in range(1 << 15)]
    for i, one in enumerate(keys[: 1 << 14]):
        table.add(one, i)
    assert table.nbytes, "they are in a sorted run"
    assert table.find(keys[16_374:16_394]).tolist() == [*range(16_374, 16_384), *[-1] * 10]


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 200_000), st.integers(0, 1 << 60), max_size=50), st.integers(0, 200_000))
def test_numbers(values, stop):
    numbers = Numbers()
    for index, value in values.items():
        numbers[index] = value
    for index in [*values, stop]:
        assert numbers[index] == values.get(index, -1)
    start = max(0, stop - 1000)
    expected = [values.get(i, -1) for i in range(start, stop)]
    assert np.array_equal(numbers.slice(start, stop), expected)
