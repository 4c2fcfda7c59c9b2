"""Decode steps as CUDA graphs: one recording per batch size, made when first needed, replayed from then on.

A graph reads which rows it serves from a buffer (-1 is padding) and finds everything else in the persistent batch, so
the host does nothing between the steps of a burst. "full" graphs also sample and append; "logits" graphs stop at the
logits, for rows that ask the sampler for more than temperature.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shoal.kernels.ops.best_of_part import best_of_part, id_of
from shoal.kernels.ops.decode_step import append_decode, prepare_decode
from shoal.kernels.ops.sample_rows import sample_rows
from shoal.workers.batch import AttentionMetadata, ForwardBatch
from shoal.workers.pending import to_device
from shoal.workers.pipeline import Stage
from shoal.workers.plan import Int32
from shoal.workers.sampling_state import SamplingState
from shoal.workers.state import BatchState

_WARM_UP_RUNS = 1  # compiles kernels and lets libraries allocate, which must not happen while recording


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to record, up to max_num_seqs. Padding reads no cache and little else, recordings take time: few.

    Beyond 256 only those whose products are fast: of an 8B model's layer they take 266 us at 384 rows, 343 at 400, 264
    at 408, 277 at 432, 440 at 448 and 303 at 512, 394 at 576 and 392 at 640, 641 at 896 and 657 at 1,024 (H100, CUDA
    13.0's library).
    """
    small = [1, 2, 4, 8, 16, 32, 48, *range(64, 256, 32), 256]
    sizes = [*small, 320, 384, 408, 432, 512, 640, 768, *range(1024, 4097, 128)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Graphs of one model over one KV cache; dropped with either."""

    def __init__(
        self, model: Any, kv_cache: list[torch.Tensor], state: BatchState, sampling: SamplingState, max_num_seqs: int
    ) -> None:
        self._model, self._kv_cache, self._state, self._sampling = model, kv_cache, state, sampling
        self._stage: Stage = model.stage
        self._sizes = graph_sizes(max_num_seqs)
        device, most = state.device, max_num_seqs
        self._max_len = state.token_ids.shape[1]

        def buffer(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._rows = buffer(torch.int64, most)
        self._input_ids, self._positions, self._slots = (buffer(torch.int64, most) for _ in range(3))
        self._seq_lens, self._out = buffer(torch.int32, most), buffer(torch.int32, most)
        self._temperatures = buffer(torch.float32, most)
        self._streams, self._generated = buffer(torch.int64, most), buffer(torch.int64, most)
        self._block_tables = buffer(torch.int32, most, state.block_tables.shape[1])
        # Input; layers may add to it.
        self.hidden = None if self._stage.first else buffer(kv_cache[0].dtype, most, model.spec.hidden_size)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._stop_ids = sampling.stop_ids.data_ptr()
        self._size = 0

    def compile(self, num_rows: int) -> None:
        """Goes through a step of so many rows outside a graph. There are none yet: it serves padding."""
        self._size = self._size_for(num_rows)
        self._rows[: self._size] = -1
        if self._stage.last:
            self._full_step()
        else:
            self._logits_step()

    def set_rows(self, rows: Int32) -> None:
        """Serve these rows from now on."""
        self._size = self._size_for(len(rows))
        padded = np.full(self._size, -1, np.int64)
        padded[: len(rows)] = rows
        self._rows[: self._size] = to_device(padded, self._rows.device)

    def decode(self) -> torch.Tensor:
        """One step with sampling: int32 [>= rows], a token for each row, -1 where it had ended."""
        return self._replay(full=True)

    def logits(self) -> torch.Tensor:
        """One step up to the logits [>= rows, vocab]; before the last pipeline stage up to the hidden states."""
        return self._replay(full=False)

    def _replay(self, full: bool) -> torch.Tensor:
        if self._stop_ids != self._sampling.stop_ids.data_ptr():  # the table grew: old recordings read the old one
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()  # the old one is gone with its last graph
            self._stop_ids = self._sampling.stop_ids.data_ptr()
        key = (self._size, full)
        if key not in self._graphs:
            self._graphs[key] = self._record(full)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def _size_for(self, num_rows: int) -> int:
        return self._sizes[bisect.bisect_left(self._sizes, num_rows)]

    def _record(self, full: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Warm up and record on a side stream. The warm-up serves padding only, so it changes nothing."""
        rows = self._rows[: self._size].clone()
        step: Callable[[], torch.Tensor] = self._full_step if full else self._logits_step
        self._rows[: self._size] = -1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                step()
            graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph(): it collects garbage and empties the cache at every recording, some 0.1 s each.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # the other thread may wait
            result = step()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._rows[: self._size] = rows
        return graph, result

    def _logits_step(self) -> torch.Tensor:
        hidden = self._hidden_step()
        if not self._stage.last:
            return hidden
        logits: torch.Tensor = self._model.compute_logits(hidden)
        return logits

    def _hidden_step(self) -> torch.Tensor:
        n, state = self._size, self._state
        prepare_decode(
            self._rows[:n],
            state.token_ids,
            state.num_tokens,
            state.block_tables,
            state.ended,
            state.block_size,
            self._input_ids[:n],
            self._positions[:n],
            self._slots[:n],
            self._seq_lens[:n],
            self._block_tables[:n],
            state.num_prompt_tokens,
            self._sampling.temperatures,
            self._sampling.streams,
            self._temperatures[:n],
            self._streams[:n],
            self._generated[:n],
        )
        attention = AttentionMetadata(
            self._starts[: n + 1],
            self._seq_lens[:n],
            self._block_tables[:n],
            self._slots[:n],
            state.block_size,
            1,
            self._max_len,
            rows_decode_apart=True,
        )
        received = None if self.hidden is None else self.hidden[:n]
        batch = ForwardBatch(self._input_ids[:n], self._positions[:n], attention, received)
        hidden: torch.Tensor = self._model(batch, self._kv_cache)
        return hidden

    def _sample(self, hidden: torch.Tensor) -> torch.Tensor:
        """An id for each row. Ranks that share the vocabulary compare what each has found, not their logits."""
        model, n = self._model, self._size
        wishes = self._temperatures[:n], self._streams[:n], self._generated[:n]
        if model.tp.world_size == 1:
            return sample_rows(model.compute_logits(hidden), *wishes)
        head = model.lm_head
        return id_of(model.tp.maximum(best_of_part(model.local_logits(hidden), *wishes, head.first, head.num_ids)))

    def _full_step(self) -> torch.Tensor:
        hidden = self._hidden_step()
        n, state, sampling = self._size, self._state, self._sampling
        rows = self._rows[:n]
        sampled = self._sample(hidden)
        append_decode(
            rows,
            sampled,
            state.token_ids,
            state.num_tokens,
            state.num_prompt_tokens,
            sampling.min_tokens,
            sampling.stop_ids,
            state.ended,
            self._out[:n],
        )
        return self._out[:n]
