"""Sums through memory that ranks share: ranks are threads, their memory this process's, the kernel is interpreted."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from shoal.workers import overlap, peers
from shoal.workers.layers.linear import RowParallelLinear
from shoal.workers.layers.norm import RMSNorm
from shoal.workers.models.registry import load_model_class
from shoal.workers.models.spec import ModelSpec, RopeSpec
from shoal.workers.overlap import DONE, READY, Overlap
from shoal.workers.parallel import TensorParallel
from shoal.workers.peers import PeerMemory, share_of
from shoal.workers.plan import NewRow, RowSampling, SchedulerOutput
from shoal.workers.state import BatchState

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_interpreter.py")
ROWS, INPUTS, SIZE = 8, 12, 20


class Handle:
    """What torch's symmetric memory says of one buffer a rank; `barrier` is the threads' own."""

    def __init__(self, buffers: list[torch.Tensor], meet: threading.Barrier) -> None:
        self.buffers, self.meet = buffers, meet

    def get_buffer(self, rank: int, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        assert self.buffers[rank].shape == shape
        assert self.buffers[rank].dtype == dtype
        return self.buffers[rank]

    def barrier(self, channel: int) -> None:
        assert channel in (0, 1)
        self.meet.wait(timeout=60)


def on_ranks(world_size: int, run: Callable[[TensorParallel], Any]) -> list[Any]:
    """`run` on every rank."""
    buffers = [torch.full((2, ROWS, SIZE), float("nan")) for _ in range(world_size)]
    meet, results = threading.Barrier(world_size), [None] * world_size

    def main(rank: int) -> None:
        tp = TensorParallel(rank, world_size)
        tp.peers = PeerMemory(Handle(buffers, meet), buffers[rank], rank, world_size)
        try:
            with torch.inference_mode():
                results[rank] = run(tp)
        except BaseException as error:
            results[rank] = error
            meet.abort()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture
def _kernel(monkeypatch):
    """The Triton kernel, one thread at a time: the interpreter has one state."""
    run, lock = peers.sum_add_norm.get("triton"), threading.Lock()

    def one_at_a_time(*args: Any) -> None:
        with lock:
            run(*args)

    monkeypatch.setattr(peers, "sum_add_norm", one_at_a_time)


@interpreted
@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_rows", [1, 5, ROWS])
@pytest.mark.parametrize(("bias", "scale", "last_norm"), [(False, 1.0, True), (True, 0.6, True), (True, 1.0, False)])
def test_two_blocks_equal_one_rank(world_size, num_rows, bias, scale, last_norm) -> None:
    """Two sums in a row: the second finds the residual that the first left."""
    generator = torch.Generator().manual_seed(num_rows)
    inputs = INPUTS * world_size
    weights = [torch.randn(SIZE, inputs, generator=generator) for _ in range(2)]
    biases = [torch.randn(SIZE, generator=generator) for _ in range(2)]
    xs = [torch.randn(num_rows, inputs, generator=generator) for _ in range(2)]
    start, norm_weight = torch.randn(num_rows, SIZE, generator=generator), torch.rand(SIZE, generator=generator)

    def run(tp: TensorParallel) -> torch.Tensor:
        norm = RMSNorm(SIZE, 1e-5)
        norm.weight.data.copy_(norm_weight)
        residual, outputs = start.clone(), []
        share = slice(tp.rank * (inputs // tp.world_size), (tp.rank + 1) * (inputs // tp.world_size))
        for index in range(2):
            layer = RowParallelLinear(inputs, SIZE, tp, bias=bias)
            layer.weight.data.copy_(weights[index][:, share])
            if layer.bias is not None:
                layer.bias.data.copy_(biases[index])
            wanted = norm if last_norm or index == 0 else None
            output, residual = layer.add_norm(xs[index][:, share], residual, wanted, scale)
            outputs.append(output.clone())
        return torch.stack(outputs)

    expected = run(TensorParallel())
    results = on_ranks(world_size, run)
    for result in results:
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(result, results[0]), "ranks differ"


@interpreted
@pytest.mark.usefixtures("_kernel")
def test_all_reduce_of_other_widths() -> None:
    def run(tp: TensorParallel) -> list[Any]:
        assert tp.peers is not None
        sums = [tp.all_reduce(torch.arange(12.0).view(3, 4) * (tp.rank + 1)) for _ in range(2)]
        refused = [torch.ones(ROWS + 1, SIZE), torch.ones(3, SIZE, dtype=torch.float16), torch.ones(3, 3)]
        return [*sums, *(tp.peers.all_reduce(tensor) for tensor in refused)]

    for first, second, *refused in on_ranks(3, run):
        assert torch.equal(first, torch.arange(12.0).view(3, 4) * 6)
        assert torch.equal(second, first), "a later sum wrote over an earlier one's result"
        assert refused == [None] * 3


class ThreadLink:
    """A link without streams: sums are done at once."""

    def __init__(self, meet: threading.Barrier) -> None:
        self.meeting = meet

    def apart(self) -> Any:
        return contextlib.nullcontext()

    def mark(self) -> None:
        return None

    def join(self, mark: None) -> None:
        assert mark is None

    def meet(self, kind: int) -> None:
        assert kind in (READY, DONE)
        self.meeting.wait(timeout=60)


@dataclass
class Source:
    name: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def load(self) -> torch.Tensor:
        return self.tensor

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        return self.tensor.narrow(dim, start, length)


def checkpoint(spec: ModelSpec) -> list[Source]:
    generator, sources = torch.Generator().manual_seed(3), []
    hidden, inner = spec.hidden_size, spec.intermediate_size
    heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (spec.vocab_size, hidden), "norm": (hidden,)}
    for layer in range(spec.num_layers):
        for name, shape in {
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, heads), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            shapes[f"layers.{layer}.{name}"] = shape
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator) * 0.3 + (1.0 if len(shape) == 1 else 0.0)
        sources.append(Source(f"model.{name}.weight", tensor))
    return sources


@interpreted
@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("world_size", [2, 4])
def test_halves_of_a_step_equal_one_rank(world_size, monkeypatch) -> None:
    """A prefill of four rows, whole and cut in two, on ranks that sum through shared memory."""
    spec = ModelSpec(
        architecture="LlamaForCausalLM", model_type="llama", vocab_size=50, hidden_size=SIZE, num_layers=3,
        num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=8, max_position_embeddings=32,
        rope=RopeSpec(), tie_word_embeddings=True, attention_scale=0.5,
    )  # fmt: skip
    lengths = np.array([2, 3, 1, 2], np.int32)
    monkeypatch.setattr(overlap, "sum_add_norm", peers.sum_add_norm)
    meet = threading.Barrier(world_size)

    def run(tp: TensorParallel) -> list[torch.Tensor]:
        model = load_model_class(spec.architecture)(spec, tp)
        model.load_weights(checkpoint(spec))
        state = BatchState(4, 16, 4, torch.device("cpu"))
        rows = np.arange(4, dtype=np.int32)
        ones = np.ones(4, np.int32)
        plan = SchedulerOutput(0, rows, lengths, ones.astype(np.uint8), ones)
        plan.new_rows = [
            NewRow(row, np.arange(row, row + n, dtype=np.int32), int(n), 0, RowSampling())
            for row, n in enumerate(lengths)
        ]
        plan.block_rows, plan.block_positions, plan.block_ids = rows, 0 * rows, rows
        state.apply(plan)
        results = []
        for cut in (0, 2):
            cache = torch.zeros(3, 2, 4, 4, spec.num_kv_heads_per_rank(tp.world_size), spec.head_dim)
            batch = state.forward_batch(rows, lengths)
            if cut and tp.peers is not None:
                tp.peers.overlap = Overlap(tp.peers, ThreadLink(meet))
                batch.halves = tuple(state.forward_batch(part, lengths[part]) for part in (rows[:cut], rows[cut:]))
            results.append(model(batch, list(cache)).clone())
        return results

    expected = run(TensorParallel())
    for whole, halves in on_ranks(world_size, run):
        torch.testing.assert_close(whole, expected[0], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(halves, expected[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("places", "reach", "reason"),
    [
        ([("a", "1", 0), ("a", "1", 1)], True, ""),
        ([("a", "1", 0), ("b", "2", 1)], True, "on different hosts (a, b)"),
        ([("a", "1", 0), ("a", "2", 1)], True, "on different hosts"),
        ([("a", "1", 0), ("a", "1", 1)], False, "ranks 0 and 1 have no peer access"),
        ([("a", "1", 0), ("a", "1", 0)], True, "two ranks share a GPU"),
    ],
)
def test_who_cannot_share_memory_and_why(places, reach, reason, monkeypatch) -> None:
    monkeypatch.setattr(peers, "_gather", lambda group, device, own: [list(place) for place in places])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reach)
    found = peers._obstacle(None, torch.device("cuda", 0))
    assert reason in found
    assert bool(found) == bool(reason)


GATHER = """
import json, sys, torch
from shoal.workers import peers
rank, meet = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
own = [f"h\u00f6st-{rank}", "boot", rank]
print(json.dumps(peers._gather(torch.distributed.group.WORLD, torch.device("cpu"), own)))
torch.distributed.destroy_process_group()
"""


def test_ranks_learn_each_others_places(tmp_path) -> None:
    command = [sys.executable, "-c", GATHER]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        said, _ = rank.communicate(timeout=120)
        assert json.loads(said.splitlines()[-1]) == [["höst-0", "boot", 0], ["höst-1", "boot", 1]]


def test_every_row_has_one_rank() -> None:
    for num_rows in range(20):
        for world_size in (1, 2, 3, 8):
            shares = [share_of(num_rows, rank, world_size) for rank in range(world_size)]
            assert [row for first, count in shares for row in range(first, first + count)] == list(range(num_rows))
