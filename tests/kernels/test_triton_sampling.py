"""The Triton kernels that select, sample_filtered and top_ids, against their references, whichever way they take.

As in test_triton.py: in the interpreter by a process of its own, and on a GPU where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from shoal.kernels.ops.philox import gumbel_noise
from shoal.kernels.registry import load_op

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TARGETS = [
    pytest.param(
        "cpu",
        dtype,
        marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter"),
        id=f"cpu-{dtype}",
    )
    for dtype in DTYPES[:2]
] + [
    pytest.param(
        "cuda",
        dtype,
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        id=f"cuda-{dtype}",
    )
    for dtype in DTYPES
]
everywhere = pytest.mark.parametrize(("device", "dtype"), TARGETS)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INF = float("inf")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten shows."""

    def fill(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-99)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))


def set_capacity(monkeypatch, capacity: int) -> None:
    from shoal.kernels.triton import sample_filtered, selection, top_ids

    for module in (sample_filtered, selection, top_ids):
        monkeypatch.setattr(module, "CAPACITY", capacity)


def normal(*shape, device="cpu", dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def streams_of(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    streams = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return streams.to(device), torch.randint(0, 1 << 20, (rows,), generator=generator).to(device)


def assert_drawn(logits, temperature, log_min_p, top_k, top_p, max_top_k=None) -> torch.Tensor:
    """Equal to the reference but where rounding may decide: top_p within 1e-6 of a boundary, noise within 1e-4."""
    op = load_op("sample_filtered")
    streams, positions = streams_of(len(logits), logits.device.type)
    shared = (streams, positions, max_top_k)
    found = op.get("triton")(logits, temperature, log_min_p, top_k, top_p, *shared)
    expected = op.reference(logits, temperature, log_min_p, top_k, top_p, *shared)
    assert found.dtype == torch.int64
    for row in (found != expected).nonzero().flatten().tolist():
        near = [
            int(op.reference(logits, temperature, log_min_p, top_k, (top_p * (1 + e)).clamp(max=1), *shared)[row])
            for e in (-1e-6, 1e-6)
        ]
        noise = gumbel_noise(streams[row : row + 1], positions[row : row + 1], logits.shape[1])[0]
        scores = logits[row].float() / temperature[row] + noise
        close = abs(float(scores[found[row]] - scores[expected[row]])) < 1e-4
        assert int(found[row]) in near or close, (row, int(found[row]), int(expected[row]))
    return found


def wishes(rows: int, vocab: int, device: str) -> tuple[torch.Tensor, ...]:
    """temperature, top_k and top_p that differ from row to row, all combinations within 20 rows."""
    row = torch.arange(rows, device=device)
    temperature = 0.4 + 0.3 * (row % 7)
    top_k = torch.tensor([vocab, 1, 7, 60, 1500], device=device).clamp(max=vocab)[row % 5]
    top_p = torch.tensor([1.0, 0.9, 0.3, 0.999], dtype=torch.float64, device=device)[row // 5 % 4]
    return temperature, top_k, top_p


@everywhere
@pytest.mark.parametrize("capacity", [4096, 16], ids=["collected", "overflowing"])
@pytest.mark.parametrize("vocab", [1, 33, 4200])
def test_every_combination(vocab, capacity, device, dtype, monkeypatch) -> None:
    """Peaked and flat rows, ties (float16 and rounded logits), sorted rows, with min_p and without; a small buffer."""
    set_capacity(monkeypatch, capacity)
    rows = 20
    row = torch.arange(rows, device=device)
    logits = normal(rows, vocab + 3, device=device) * torch.tensor([4.0, 0.02, 1.0], device=device)[row % 3, None]
    logits[::4] = logits[::4].round()
    logits[1::4] = logits[1::4].sort(dim=1).values  # the best in a few tiles: the bound lets many more through
    logits[2::8] = logits[2::8].sort(dim=1, descending=True).values
    logits[:, vocab:] = 1000  # not of the vocabulary
    logits = logits.to(dtype)[:, :vocab]
    temperature, top_k, top_p = wishes(rows, vocab, device)
    log_min_p = torch.tensor([-INF, -3.0, -0.01, -9.0], device=device)[row // 5]
    assert_drawn(logits, temperature, None, top_k, top_p)
    assert_drawn(logits, temperature, log_min_p, top_k.clamp(max=60), top_p.flip(0), 60)


@everywhere
def test_draws_that_are_not_kept_are_followed_by_others(device, dtype) -> None:
    """A flat row with a small top_p keeps few ids: the first draw is rarely one of them."""
    rows, vocab = 12, 1500
    logits = torch.linspace(0, 1, vocab, device=device).to(dtype).repeat(rows, 1)
    one, off = torch.ones(rows, device=device), torch.full((rows,), vocab, device=device)
    top_p = torch.tensor([0.001, 0.05, 0.5], dtype=torch.float64, device=device).repeat(4)
    found = assert_drawn(logits, one, None, off, top_p)
    firsts = load_op("sample").reference(logits, one, None, *streams_of(rows, device))
    assert (found != firsts).sum() >= 5


@everywhere
def test_equals_go_by_id(device, dtype) -> None:
    """All logits equal: top_k and top_p keep the lowest ids, exactly as many as they say."""
    rows, vocab = 60, 520
    logits = torch.zeros(rows, vocab, device=device, dtype=dtype)
    one = torch.ones(rows, device=device)
    top_k = torch.tensor([3, 41, vocab], device=device).repeat(20)
    top_p = torch.tensor([1.0, 1.0, 5.5 / vocab], dtype=torch.float64, device=device).repeat(20)
    found = assert_drawn(logits, one, None, top_k, top_p).view(20, 3).T.tolist()
    assert set(found[0]) == {0, 1, 2}
    assert max(found[1]) < 41
    assert set(found[2]) <= set(range(6))


@everywhere
def test_most_is_ruled_out(device, dtype) -> None:
    """allowed_token_ids and the like leave -inf nearly everywhere: fewer ids than top_k, or none."""
    rows, vocab = 10, 4200
    logits = torch.full((rows, vocab), -INF, device=device, dtype=dtype)
    logits[:, 4150] = 1
    logits[::2, 7] = 2
    temperature, top_k, top_p = wishes(rows, vocab, device)
    found = assert_drawn(logits, temperature, None, top_k, top_p)
    assert set(found.tolist()) <= {7, 4150}
    nothing = torch.full_like(logits, -INF)
    for log_min_p in (None, torch.full((rows,), -1.0, device=device)):
        run = load_op("sample_filtered").get("triton")
        assert run(nothing, temperature, log_min_p, top_k, top_p, *streams_of(rows, device)).tolist() == [0] * rows


@everywhere
def test_nan_gives_an_id(device, dtype) -> None:
    logits = normal(20, 4200, device=device, dtype=dtype)
    logits[:10] = float("nan")
    logits[10:, ::2] = -torch.tensor(float("nan"))
    temperature, top_k, top_p = wishes(20, 4200, device)
    found = load_op("sample_filtered").get("triton")(logits, temperature, None, top_k, top_p, *streams_of(20, device))
    assert ((found >= 0) & (found < 4200)).all()


@everywhere
@pytest.mark.parametrize("capacity", [4096, 16], ids=["collected", "overflowing"])
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (40, 9), (40, 33), (4200, 5), (4200, 120), (4200, 700)])
def test_top_ids(vocab, k, capacity, device, dtype, monkeypatch) -> None:
    set_capacity(monkeypatch, capacity)
    logits = normal(4, vocab + 2, device=device, dtype=dtype, scale=3)[:, :vocab]
    logits[0] = logits[0].round()
    logits[1] = 0
    logits[1, ::2] = -0.0
    logits[2, 1:] = -INF
    op = load_op("top_ids")
    assert torch.equal(op.get("triton")(logits, k), op.reference(logits, k))


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rows", [1, 60, 260])
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(151936, torch.bfloat16), (128256, torch.float32), (50257, torch.float16)]
)
def test_real_sizes(rows, vocab, dtype) -> None:
    temperature, top_k, top_p = wishes(rows, vocab, "cuda")
    for scale in (0.02, 3.0):
        logits = normal(rows, vocab, device="cuda", dtype=dtype, scale=scale)
        assert_drawn(logits, temperature, None, top_k, top_p)
        assert_drawn(logits, temperature, torch.full_like(temperature, -4.0), top_k, top_p)
        assert_drawn(logits, temperature, None, top_k.clamp(max=1000), top_p, 1000)
        for k in (1, 20, 1000):
            assert torch.equal(load_op("top_ids").get("triton")(logits, k), load_op("top_ids").reference(logits, k))


@pytest.mark.gpu
@on_a_gpu
def test_graphs_may_record_it() -> None:
    logits = normal(9, 30000, device="cuda", dtype=torch.bfloat16, scale=3)
    temperature, top_k, top_p = wishes(9, 30000, "cuda")
    run, draws = load_op("sample_filtered").get("triton"), streams_of(9, "cuda")
    wanted = run(logits, temperature, None, top_k, top_p, *draws)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(logits, temperature, None, top_k, top_p, *draws)
    for _ in range(2):
        graph.replay()
        assert torch.equal(recorded, wanted)


@pytest.mark.skipif(INTERPRETED, reason="is running now")
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when a kernel is defined whether it is interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
