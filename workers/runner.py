"""ModelRunner: one rank's weights, KV cache and batch; `execute` turns a plan into sampled tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from shoal.workers.batch import AttentionMetadata, ForwardBatch
from shoal.workers.config import WorkerConfig
from shoal.workers.loading import load_weights
from shoal.workers.models.registry import load_model_class
from shoal.workers.parallel import TensorParallel
from shoal.workers.pending import PendingOutput, to_device
from shoal.workers.pipeline import Pipeline
from shoal.workers.plan import Int32, SchedulerOutput, concat_logprobs
from shoal.workers.sampler import Sampler, SamplingState
from shoal.workers.state import BatchState

if TYPE_CHECKING:
    from shoal.workers.decode_graphs import DecodeGraphs

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OVERLAP_TOKENS = 2048  # of a step that is cut into halves to hide sums over ranks behind products
_PROMPT_LOGITS_BYTES = 256 << 20  # float32 logits of prompt positions held at once


class ModelRunner:
    """Everything a rank computes with. One thread calls it; that thread sets the device and inference mode."""

    def __init__(
        self,
        config: WorkerConfig,
        tp: TensorParallel,
        logits_processors: Sequence[Any] = (),
        pipeline: Pipeline | None = None,
    ) -> None:
        self.config = config
        self.tp = tp
        self.pipeline = pipeline or Pipeline()
        self.stage = self.pipeline.stage
        self.spec = config.spec
        self.num_layers = len(self.spec.stage_layers(self.stage.index, self.stage.count))  # of this rank
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if config.device == "cuda" else torch.device("cpu")
        )
        self.dtype = DTYPES[config.dtype]
        if not config.disable_custom_all_reduce:
            tp.open_peers(config.max_num_batched_tokens, self.spec.hidden_size, self.dtype, self.device)
        self.model: Any = None
        self.kv_cache: list[torch.Tensor] = []
        self.graphs: DecodeGraphs | None = None
        self.num_blocks = 0
        self.state = BatchState(config.max_num_seqs, config.max_model_len, config.block_size, self.device)
        self.sampling = SamplingState(config.max_num_seqs, self.spec.vocab_size, self.device, logits_processors)
        self.sampler = Sampler(self.sampling, self.state)
        # Reading a flag from CPU memory costs nothing, so rows that ended inside a burst are dropped at once there.
        self._drop_ended = self.device.type == "cpu"
        self._prompt_logprobs: dict[int, int] = {}  # row -> how many it asked for

    # ---- weights and memory ------------------------------------------------------------------------------------

    def load(self) -> float:
        """Build the model and read this rank's shard; seconds it took."""
        start = time.monotonic()
        previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                self.model = load_model_class(self.spec.model_class)(self.spec, self.tp, self.stage)
            load_weights(self.model, self.config.load)
        finally:
            torch.set_default_dtype(previous)
        self.model.eval()
        return time.monotonic() - start

    def weight_bytes(self) -> int:
        """Bytes of this rank's parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers of this rank."""
        heads = self.spec.num_kv_heads_per_rank(self.tp.world_size)
        return 2 * self.num_layers * self.config.block_size * heads * self.spec.head_dim * self.dtype.itemsize

    def free_kv_bytes(self, utilization: float) -> int:
        """GPU bytes left for KV: `utilization` of all memory, less what is in use and what a full step needs on top."""
        assert self.device.type == "cuda"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._full_step()
        torch.cuda.synchronize()
        transient = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return int(total * utilization) - (total - free) - transient

    def allocate_kv(self, num_blocks: int) -> None:
        """The KV cache: for each layer [2, num_blocks, block_size, kv heads of this rank, head_dim]."""
        heads = self.spec.num_kv_heads_per_rank(self.tp.world_size)
        shape = (2, num_blocks, self.config.block_size, heads, self.spec.head_dim)
        self.num_blocks = num_blocks
        self.kv_cache = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.num_layers)]
        self._make_graphs()

    def release_kv(self) -> None:
        """No cache, and nothing that holds it."""
        self.kv_cache, self.graphs = [], None

    def _make_graphs(self) -> None:
        """Graphs hold addresses of weights and cache: new ones whenever either is."""
        self.graphs = None
        if self.device.type == "cuda" and not self.config.enforce_eager and self.num_blocks > 1:
            from shoal.workers.decode_graphs import DecodeGraphs

            self.graphs = DecodeGraphs(self.model, self.kv_cache, self.state, self.sampling, self.config.max_num_seqs)

    def _full_step(self) -> None:
        """The largest step there can be, on made-up input, over one KV block."""
        config = self.config
        self.allocate_kv(1)
        rows = min(config.max_num_seqs, config.max_num_batched_tokens)
        length = min(config.max_num_batched_tokens // rows, config.max_model_len)
        num_tokens = rows * length
        index = torch.arange(num_tokens, device=self.device)
        attention = AttentionMetadata(
            cu_seqlens_q=torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=self.device),
            seq_lens=torch.full((rows,), length, dtype=torch.int32, device=self.device),
            block_tables=torch.zeros((rows, -(-length // config.block_size)), dtype=torch.int32, device=self.device),
            slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device),
            block_size=config.block_size,
            max_query_len=length,
            max_seq_len=length,
        )
        batch = ForwardBatch(index % self.spec.vocab_size, index % length, attention)
        if not self.stage.first:
            batch.hidden = torch.zeros(num_tokens, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        hidden = self.model(batch, self.kv_cache)
        if self.stage.last:
            self.model.compute_logits(hidden[:rows]).float().softmax(-1)
        self.release_kv()

    # ---- the step ----------------------------------------------------------------------------------------------

    def execute(self, plan: SchedulerOutput) -> PendingOutput:
        """Run a plan: on a GPU, enqueue it. Every rank of the last stage samples, and samples the same."""
        self.pipeline.settle(plan.rows, self.state)
        self.state.apply(plan)
        for new in plan.new_rows if self.stage.last else ():
            self.sampling.add(new.row, new.sampling, new.token_ids, new.num_prompt_tokens)
            self._prompt_logprobs.pop(new.row, None)
            if new.sampling.num_prompt_logprobs is not None:
                self._prompt_logprobs[new.row] = new.sampling.num_prompt_logprobs
        out = PendingOutput(plan, self.device)
        if self.graphs is not None and plan.rows_decode_apart:
            self._replay(plan, out)
        else:
            for step in range(plan.num_steps):
                self._run_step(plan, step, out)
        return out.start_copy()

    def _replay(self, plan: SchedulerOutput, out: PendingOutput) -> None:
        """A plan in which every row decodes and none waits for another, by graphs."""
        assert self.graphs is not None
        plain = self.stage.last and self.sampling.is_plain(plan.rows)
        num_rows = 0
        for step in range(plan.num_steps):
            active = np.flatnonzero(plan.row_steps > step).astype(np.int32)
            rows = plan.rows[active]
            if len(rows) != num_rows:
                num_rows = len(rows)
                self.graphs.set_rows(rows)
            self.pipeline.settle(rows, self.state)
            if self.graphs.hidden is not None:
                self.graphs.hidden[:num_rows] = self._receive(num_rows)
            if not self.stage.last:
                self._pass_on(self.graphs.logits()[:num_rows], rows)
            elif plain:
                out.put(active, step, self.graphs.decode()[:num_rows])
                self.pipeline.give_back(rows, self.state)
            else:
                self._sample(rows, active, self.graphs.logits()[:num_rows], step, out)
            self.state.advance(rows, np.ones_like(rows))

    def _run_step(self, plan: SchedulerOutput, step: int, out: PendingOutput) -> None:
        active = np.flatnonzero(plan.row_steps > step).astype(np.int32)
        rows, counts = plan.rows[active], plan.num_scheduled_tokens[active]
        self.pipeline.settle(rows, self.state)
        if self._drop_ended:
            alive = ~self.state.ended[torch.from_numpy(rows.astype(np.int64))].numpy()
            self.state.advance(rows[~alive], counts[~alive])
            active, rows, counts = active[alive], rows[alive], counts[alive]
            if not len(rows):
                return
        batch = self.state.forward_batch(rows, counts)
        if not self.stage.first:
            batch.hidden = self._receive(len(batch.input_ids))
        batch.halves = self._halves(rows, counts)
        picks = np.flatnonzero(plan.samples[active])
        # The last layer computes sampling tokens only, unless ranks keep each other's residuals, by rows of the step.
        whole = not self.stage.last or self.tp.peers is not None or bool(self._prompt_logprobs)
        if not whole and len(picks) < len(batch.input_ids):
            batch.sampling_rows = to_device(picks, self.device)
        hidden = self.model(batch, self.kv_cache)
        if not self.stage.last:
            self.state.advance(rows, counts)
            self._pass_on(hidden, rows[picks])
            return
        if self._prompt_logprobs:
            self._score_prompts(active, rows, counts, hidden, out)
        self.state.advance(rows, counts)
        if len(picks):
            if len(hidden) != len(picks):  # prompts are scored too
                hidden = hidden[batch.attention.cu_seqlens_q[1:].long()[to_device(picks, self.device)] - 1]
            logits = self.model.compute_logits(hidden)
            self._sample(rows[picks], out.sampling_index[active[picks]], logits, step, out)

    def _sample(self, rows: Int32, places: Int32, logits: torch.Tensor, step: int, out: PendingOutput) -> None:
        """The next token of each row, appended to it; `places` are the rows' places among the sampling rows."""
        device_rows = to_device(rows.astype(np.int64), self.device)
        result = self.sampler(logits, device_rows, rows.tolist())
        token_ids = result.token_ids
        if not self._drop_ended:
            token_ids = torch.where(self.state.ended[device_rows], -1, token_ids)
        out.put(places, step, token_ids)
        if result.logprobs is not None:
            out.put_logprobs(places, result.logprobs)
        self.state.append(device_rows, result.token_ids, result.ended)
        self.sampler.observe(device_rows, result.token_ids)
        self.pipeline.give_back(rows, self.state)

    def _halves(self, rows: Int32, counts: Int32) -> tuple[ForwardBatch, ForwardBatch] | None:
        """The step's first rows and the others, about equally many tokens, where that hides sums over ranks."""
        peers, ends = self.tp.peers, np.cumsum(counts)
        if peers is None or peers.overlap is None or not _OVERLAP_TOKENS <= ends[-1] <= peers.num_rows:
            return None
        cut = int(np.abs(ends[:-1] - ends[-1] / 2).argmin()) + 1 if len(rows) > 1 else 0
        if not cut or min(ends[cut - 1], ends[-1] - ends[cut - 1]) < _OVERLAP_TOKENS // 4:
            return None
        return self.state.forward_batch(rows[:cut], counts[:cut]), self.state.forward_batch(rows[cut:], counts[cut:])

    def _pass_on(self, hidden: torch.Tensor, sampling_rows: Int32) -> None:
        """To the next stage; the last will tell what it sampled for these rows."""
        self.pipeline.send(hidden)
        if len(sampling_rows):
            self.pipeline.expect(sampling_rows, self.state)

    def _receive(self, num_tokens: int) -> torch.Tensor:
        return self.pipeline.receive(num_tokens, self.spec.hidden_size, self.dtype, self.device)

    def _score_prompts(
        self, active: Int32, rows: Int32, counts: Int32, hidden: torch.Tensor, out: PendingOutput
    ) -> None:
        """Log-probabilities of the prompt tokens that this pass predicts, for the rows that asked."""
        chunk = max(1, _PROMPT_LOGITS_BYTES // (4 * self.spec.vocab_size))
        offset = 0
        for place, row, count in zip(active.tolist(), rows.tolist(), counts.tolist(), strict=True):
            start = int(self.state.num_computed[row])
            end = min(start + count, int(self.state.prompt_lens[row]) - 1)  # the last prompt token predicts no prompt
            if row in self._prompt_logprobs and end > start:
                k = self._prompt_logprobs[row]
                targets = self.state.token_ids[row, start + 1 : end + 1].long()
                parts = []
                for first in range(0, end - start, chunk):
                    last = min(first + chunk, end - start)
                    logits = self.model.compute_logits(hidden[offset + first : offset + last])
                    parts.append(self.sampler.prompt_logprobs(logits, targets[first:last], k))
                out.prompt_logprobs[place] = (start + 1, concat_logprobs(parts))
            offset += count

    def free_memory(self) -> None:
        """After a step that did not fit: what the allocator keeps in pieces goes back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- sleep -------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        """Give memory back: the KV cache always; weights to host memory (level 1, on a GPU) or dropped (level 2)."""
        self.release_kv()
        if level == 1 and self.device.type == "cuda":
            self.model.to("cpu")
        elif level == 2:
            self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake_up(self, tags: tuple[str, ...]) -> None:
        """Undo `sleep`: "weights" come back from host memory or the checkpoint, "kv_cache" is made again, empty."""
        if "weights" in tags:
            if self.model is None:
                self.load()
            else:
                self.model.to(self.device)
            if self.kv_cache:
                self._make_graphs()
        if "kv_cache" in tags and not self.kv_cache:
            self.allocate_kv(self.num_blocks)

    def apply_model(self, function: Callable[[nn.Module], T]) -> T:
        """`function(model)`."""
        return function(self.model)
