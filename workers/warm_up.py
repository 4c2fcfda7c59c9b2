"""Before the first step: every kernel of the usual steps compiled, in parallel, and a step of each kind tried."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

from shoal.workers.batch import AttentionMetadata, ForwardBatch
from shoal.workers.plan import NewRow, RowSampling, SchedulerOutput

if TYPE_CHECKING:
    from shoal.workers.runner import ModelRunner

# Ends of the ranges of rows that have tiles of their own, or let what follows start late.
_DECODE_ROWS = (1, 2, 16, 17, 64, 65, 128, 129, 256, 257)
_TRIED_ROWS = 2  # the first greedy, the other random
_PREFILL_ROWS = ([512], [128, 128, 128, 128, 1, 1, 1, 1])  # tokens of a pass; of one whose rows partly decode


def compile_kernels(runner: ModelRunner) -> None:
    """On a GPU; the runner has its weights and, for now, a cache of two blocks."""
    from shoal.kernels.triton.compile_ahead import compiling_only

    runner.allocate_kv(2)
    with compiling_only():
        for counts in _PREFILL_ROWS:
            runner.model(_pass(runner, counts), runner.kv_cache)
        if runner.graphs is not None:
            for rows in _DECODE_ROWS:
                if rows <= runner.config.max_num_seqs:
                    runner.graphs.compile(rows)
    runner.release_kv()


def try_steps(runner: ModelRunner) -> None:
    """A step of prompts and one of decoding, on made-up rows over the first blocks: what either does for the first time
    (loading kernels, the first graph) is then done. Leaves nothing that the driver's first rows meet."""
    ones = np.ones(_TRIED_ROWS, np.int32)
    rows = np.arange(_TRIED_ROWS, dtype=np.int32)
    length = min(runner.config.block_size, runner.config.max_model_len - 2)
    if length < 1 or runner.num_blocks < 2 * _TRIED_ROWS or runner.config.max_num_seqs < _TRIED_ROWS:
        return
    prompt = np.ones(length, np.int32)
    new_rows = [NewRow(int(row), prompt, length, 0, RowSampling(temperature=0.5 * row)) for row in rows]
    blocks = np.repeat(rows, 2), np.tile(rows[:2], _TRIED_ROWS), np.arange(2 * _TRIED_ROWS, dtype=np.int32)
    samples = ones.astype(np.uint8)
    runner.execute(SchedulerOutput(0, rows, ones * length, samples, ones, 1, new_rows, *blocks)).wait()
    runner.execute(SchedulerOutput(1, rows, ones, samples, ones)).wait()


def _pass(runner: ModelRunner, row_counts: list[int]) -> ForwardBatch:
    """Rows of so many tokens, all of them padding."""
    device, config = runner.device, runner.config
    counts = torch.tensor(row_counts, dtype=torch.int32, device=device)
    starts = torch.tensor([0, *itertools.accumulate(row_counts)], dtype=torch.int32, device=device)
    zeros = torch.zeros(sum(row_counts), dtype=torch.int64, device=device)
    tables = torch.zeros((len(counts), -(-config.max_model_len // config.block_size)), dtype=torch.int32, device=device)
    attention = AttentionMetadata(
        starts, counts, tables, zeros - 1, config.block_size, max(row_counts), config.max_model_len
    )
    batch = ForwardBatch(zeros, zeros, attention)
    if not runner.stage.first:
        batch.hidden = torch.zeros(len(zeros), runner.spec.hidden_size, dtype=runner.dtype, device=device)
    if runner.stage.last and runner.tp.peers is None:
        batch.sampling_rows = torch.arange(len(counts), device=device)
    return batch
