"""Every kernel of the usual steps compiled before the first of them, in parallel: no step waits for a compiler."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from shoal.workers.batch import AttentionMetadata, ForwardBatch

if TYPE_CHECKING:
    from shoal.workers.runner import ModelRunner

_DECODE_ROWS = (1, 16, 17, 64, 65, 128, 129, 256, 257)  # ends of the ranges of rows that have tiles of their own
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
