"""The forecast of KV: against stepping through it, and what it says of lengths."""

import random

from shoal.driver.draft import SchedulerLimits
from shoal.driver.forecast import KVLoad, OutputLengths
from shoal.driver.params import SamplingParams
from shoal.driver.request import EngineRequest
from shoal.driver.scheduler import Scheduler


def peak(requests: list[tuple[int, int]]) -> int:
    """Most tokens held at any step, one request at a time."""
    most = 0
    for step in range(max(left for _, left in requests) + 1):
        most = max(most, sum(held + step for held, left in requests if left >= step))
    return most


def test_admission_is_exact_for_known_lengths() -> None:
    rng = random.Random(0)
    outcomes = set()
    for _ in range(300):
        capacity = rng.randint(20, 200)
        load, inside = KVLoad(capacity, block_size=1), []
        for _ in range(8):
            one = (rng.randint(1, 40), rng.randint(0, 40))
            fits = peak([*inside, one]) <= capacity
            outcomes.add(fits)
            assert load.admits(*one) == fits
            if fits:
                inside.append(one)
    assert outcomes == {True, False}


def test_expected_length_is_the_mean_of_the_longer_ones() -> None:
    lengths = OutputLengths()
    for length in [10] * 10:
        lengths.add(length)
    assert lengths.expected_left(0) == 0, "too few have ended"
    for length in [30] * 10:
        lengths.add(length)
    assert lengths.expected_left(0) == 20
    assert lengths.expected_left(10) == 20, "only the longer ones count"
    assert lengths.expected_left(30) == 0


def test_a_request_is_let_in_as_soon_as_the_peak_allows() -> None:
    """48 tokens: rows of 8 + 24 and 8 + 2 hold 34 at most, one of 16 + 24 beside them 72."""
    scheduler = Scheduler(SchedulerLimits(64, 4, 64, num_blocks=12, block_size=4))
    for number, (prompt, output) in enumerate(((8, 24), (8, 2), (16, 24))):
        params = SamplingParams(max_tokens=output)
        scheduler.add(EngineRequest(number, [3 + number] * prompt, params, stop_ids=(), eos_ids=()))
    plan = scheduler.schedule()
    assert plan is not None
    assert [request.source.number for request in plan.requests] == [0, 1]
