"""Which plans run without rows waiting for each other. test_scheduler.py's traces check what such rows read."""

from __future__ import annotations

import numpy as np

from shoal.driver.draft import Plan, SchedulerLimits
from shoal.driver.params import SamplingParams
from shoal.driver.request import EngineRequest
from shoal.driver.scheduler import Scheduler
from shoal.workers.plan import StepOutput


def add(scheduler: Scheduler, number: int, prompt: list[int]) -> None:
    scheduler.add(EngineRequest(number, prompt, SamplingParams(max_tokens=20), stop_ids=(), eos_ids=()))


def step(scheduler: Scheduler, token: int) -> Plan:
    """The next plan, in which every row samples this token."""
    plan = scheduler.schedule()
    ids = np.full((int(plan.output.samples.sum()), 1), token, np.int32)
    scheduler.update(plan, StepOutput(plan.output.step_id, ids))
    return plan


def test_a_row_that_enters_on_what_another_writes_in_the_same_step() -> None:
    """It decodes from its first token on, and yet the plan's rows must not run apart."""
    scheduler = Scheduler(
        SchedulerLimits(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, num_blocks=64, block_size=4)
    )
    add(scheduler, 0, [3, 3, 3])
    assert not step(scheduler, 5).output.rows_decode_apart
    add(scheduler, 1, [3, 3, 3, 5, 7])
    plan = step(scheduler, 6)
    writer, reader = (int(row) for row in plan.output.rows)
    assert plan.output.num_scheduled_tokens.tolist() == [1, 1]
    assert plan.output.samples.all()
    new = plan.output.new_rows[0]
    assert (new.row, new.num_computed_tokens) == (reader, 4)  # position 3 is what the writer's token writes
    assert writer != reader
    assert plan.requests[0].block_table[0] == plan.requests[1].block_table[0]
    assert not plan.output.rows_decode_apart
    assert step(scheduler, 6).output.rows_decode_apart


def test_rows_that_enter_with_one_token_and_no_hit_run_apart() -> None:
    scheduler = Scheduler(
        SchedulerLimits(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, num_blocks=64, block_size=4)
    )
    add(scheduler, 0, [3])
    add(scheduler, 1, [3])
    assert step(scheduler, 5).output.rows_decode_apart
