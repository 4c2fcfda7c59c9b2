"""Layers on several ranks, computed rank by rank; the process group itself in two processes."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import linear

from shoal.workers.batch import AttentionMetadata
from shoal.workers.layers.activation import Activation
from shoal.workers.layers.attention import Attention
from shoal.workers.layers.embedding import LearnedPositions, ParallelLMHead, VocabParallelEmbedding
from shoal.workers.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from shoal.workers.layers.norm import LayerNorm, RMSNorm
from shoal.workers.layers.rotary import RotaryEmbedding
from shoal.workers.models.spec import RopeSpec
from shoal.workers.parallel import TensorParallel


class Alone(TensorParallel):
    """One rank of several whose collectives give back what it put in, so that a test combines the parts itself."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return tensor


class Source:
    name = "w"

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)

    def load(self) -> torch.Tensor:
        return self.tensor

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        return self.tensor.narrow(dim, start, length)


def fill(parameter, tensor: torch.Tensor, shard_id: int | None = None) -> None:
    parameter.weight_loader(parameter, Source(tensor), shard_id)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("transposed", [False, True])
def test_column_parallel_outputs_stand_side_by_side(transposed: bool) -> None:
    weight, bias, x = torch.randn(12, 5), torch.randn(12), torch.randn(3, 5)
    parts = []
    for rank in range(3):
        layer = ColumnParallelLinear(5, 12, Alone(rank, 3), bias=True, transposed=transposed)
        fill(layer.weight, weight.t() if transposed else weight)
        fill(layer.bias, bias)
        parts.append(layer(x))
    torch.testing.assert_close(torch.cat(parts, -1), linear(x, weight, bias))


@pytest.mark.parametrize("transposed", [False, True])
def test_row_parallel_adds_its_bias_once(transposed: bool) -> None:
    weight, bias, x = torch.randn(5, 12), torch.randn(5), torch.randn(3, 12)
    total = torch.zeros(3, 5)
    for rank in range(2):
        layer = RowParallelLinear(12, 5, Alone(rank, 2), bias=True, transposed=transposed)
        fill(layer.weight, weight.t() if transposed else weight)
        fill(layer.bias, bias)
        total += layer(x[:, rank * 6 : rank * 6 + 6]) - bias  # each rank adds it after the reduction
    torch.testing.assert_close(total + bias, linear(x, weight, bias))


def test_qkv_replicates_kv_heads_when_they_are_fewer_than_ranks() -> None:
    query, key, value = torch.randn(8, 3), torch.randn(4, 3), torch.randn(4, 3)  # 4 heads, 2 KV heads of size 2
    x = torch.randn(1, 3)
    for rank in range(4):
        layer = QKVParallelLinear(3, 2, 4, 2, Alone(rank, 4), bias=False)
        for shard, tensor in enumerate((query, key, value)):
            fill(layer.weight, tensor, shard)
        q, k, v = layer.split(layer(x))
        head = slice(rank // 2 * 2, rank // 2 * 2 + 2)
        torch.testing.assert_close(q, linear(x, query[rank * 2 : rank * 2 + 2]))
        torch.testing.assert_close(k, linear(x, key[head]))
        torch.testing.assert_close(v, linear(x, value[head]))


@pytest.mark.parametrize(("vocab_size", "world_size"), [(100, 1), (100, 2), (129, 3), (10, 2)])
def test_vocabulary_of_any_size_splits(vocab_size: int, world_size: int) -> None:
    table, ids, hidden = torch.randn(vocab_size, 6), torch.arange(vocab_size), torch.randn(4, 6)
    embedded, logits = torch.zeros(vocab_size, 6), []
    for rank in range(world_size):
        tp = Alone(rank, world_size)
        layer = VocabParallelEmbedding(vocab_size, 6, tp)
        fill(layer.weight, table)
        embedded += layer(ids)
        head = ParallelLMHead(vocab_size, 6, tp, tie=layer)
        assert head.weight is layer.weight
        untied = ParallelLMHead(vocab_size, 6, tp)
        fill(untied.weight, table)
        torch.testing.assert_close(head(hidden), untied(hidden))
        logits.append(linear(hidden, layer.weight))
    torch.testing.assert_close(embedded, table)
    whole = torch.cat(logits, -1)
    torch.testing.assert_close(whole[:, :vocab_size], hidden @ table.t())
    assert not whole[:, vocab_size:].any()


def test_lm_head_gives_vocab_size_logits() -> None:
    head = ParallelLMHead(70, 6, TensorParallel())
    table = torch.randn(70, 6)
    fill(head.weight, table)
    torch.testing.assert_close(head.gather(head(torch.eye(6))), table.t())
    assert (head.num_ids, head.rows) == (70, 128)


def test_small_layers() -> None:
    positions = LearnedPositions(5, 4, offset=2)
    fill(positions.weight, torch.arange(28.0).view(7, 4))
    assert positions(torch.tensor([0, 4]))[:, 0].tolist() == [8.0, 24.0]
    replicated = ReplicatedLinear(3, 2, bias=False)
    fill(replicated.weight, torch.ones(2, 3))
    assert replicated(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
    norm = RMSNorm(2, 0.0)
    fill(norm.weight, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(norm(torch.tensor([[1.0, 7.0]])), torch.tensor([[0.2, 2.8]]))
    normed, total = norm.add(torch.tensor([[0.5, 3.0]]), torch.tensor([[0.5, 4.0]]))
    torch.testing.assert_close(normed, torch.tensor([[0.2, 2.8]]))
    assert total.tolist() == [[1.0, 7.0]]
    plain = LayerNorm(2, 0.0, affine=False)
    assert list(plain.parameters()) == []
    torch.testing.assert_close(plain(torch.tensor([[3.0, 5.0]])), torch.tensor([[-1.0, 1.0]]))
    assert Activation("relu")(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    layer = MergedColumnParallelLinear(1, [2, 2], TensorParallel(), bias=False)
    layer.weight.data = torch.tensor([[1.0], [-2.0], [3.0], [5.0]])
    assert layer.gated(torch.ones(1, 1), "relu").tolist() == [[3.0, 0.0]]
    silu = layer.gated(torch.ones(1, 1), "silu")
    torch.testing.assert_close(silu[0, 0], torch.tensor(3 / (1 + 2.718281828**-1)))


def test_rotary_turns_by_position_times_frequency() -> None:
    cos, sin = RotaryEmbedding(RopeSpec(theta=100.0), 4, 5).cos_sin[[0, 3]].chunk(2, dim=1)
    torch.testing.assert_close(cos, torch.tensor([[0.0, 0.0], [3.0, 0.3]]).cos())
    torch.testing.assert_close(sin, torch.tensor([[0.0, 0.0], [3.0, 0.3]]).sin())


def test_attention_writes_the_cache_and_reads_it_back() -> None:
    layer = Attention(2, 1, 4, 0.5)
    cache = torch.full((2, 3, 2, 1, 4), float("nan"))
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    query, key, value = torch.randn(3, 8), torch.randn(3, 4), torch.randn(3, 4)

    def step(first: int, last: int) -> torch.Tensor:
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, last - first], dtype=torch.int32),
            seq_lens=torch.tensor([last], dtype=torch.int32),
            block_tables=table,
            slot_mapping=torch.tensor([4, 5, 0])[first:last],
            block_size=2,
            max_query_len=last - first,
            max_seq_len=last,
        )
        return layer(query[first:last], key[first:last], value[first:last], metadata, cache)

    output = torch.cat([step(0, 2), step(2, 3)])
    assert torch.equal(cache[0].flatten(0, 1)[[4, 5, 0], 0], key)
    assert torch.equal(cache[1].flatten(0, 1)[[4, 5, 0], 0], value)
    scores = torch.einsum("qhd,kd->hqk", query.view(3, 2, 4), key) * 0.5
    weights = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf")).softmax(-1)
    torch.testing.assert_close(output.view(3, 2, 4), torch.einsum("hqk,kd->qhd", weights, value))


def test_one_rank_needs_no_group() -> None:
    tp = TensorParallel.init(0, 1, "file:///nonexistent/never-made", "cpu", 1.0)
    x = torch.randn(2, 3)
    assert tp.all_reduce(x) is x
    assert tp.all_gather(x) is x
    tp.destroy()
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        TensorParallel(2, 2)


RANK = """
import sys
import torch
from shoal.workers.parallel import TensorParallel
rank = int(sys.argv[1])
tp = TensorParallel.init(rank, 2, sys.argv[2], "cpu", 60.0)
x = torch.arange(6.0).view(2, 3) + 10 * rank
strided = x.t()
print(tp.all_reduce(x.clone()).tolist(), tp.all_reduce(strided.clone().t().contiguous().t()).tolist())
print(tp.all_gather(x).tolist(), tp.all_gather(strided, 0).tolist())
tp.destroy()
tp.destroy()
"""


def test_two_processes_reduce_and_gather(tmp_path: pathlib.Path) -> None:
    method = f"file://{tmp_path}/group"
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), method], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    x = torch.arange(6.0).view(2, 3)
    total = 2 * x + 10
    parts = [x, x + 10]
    expected = [
        f"{total.tolist()} {total.t().tolist()}",
        f"{torch.cat(parts, 1).tolist()} {torch.cat([p.t() for p in parts], 0).tolist()}",
    ]
    assert outputs == [expected, expected]


def test_a_missing_rank_is_an_error_within_the_timeout(tmp_path: pathlib.Path) -> None:
    code = "import sys; from shoal.workers.parallel import TensorParallel as T; T.init(0, 2, sys.argv[1], 'cpu', 2.0)"
    done = subprocess.run(
        [sys.executable, "-c", code, f"file://{tmp_path}/group"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "timed out" in done.stderr.lower() or "timeout" in done.stderr.lower()
