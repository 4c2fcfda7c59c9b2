"""top_ids in Triton against its reference, whichever way it takes.

As in test_triton.py: in the interpreter by a process of its own, and on a GPU where there is one.
"""

from __future__ import annotations

import os

import pytest
import torch

from shoal.kernels.registry import load_op

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TARGETS = [
    pytest.param(
        "cpu",
        dtype,
        marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py"),
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
    from shoal.kernels.triton import selection, top_ids

    for module in (selection, top_ids):
        monkeypatch.setattr(module, "CAPACITY", capacity)


def normal(*shape, device="cpu", dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


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
    op = load_op("top_ids")
    for scale in (0.02, 3.0):
        logits = normal(rows, vocab, device="cuda", dtype=dtype, scale=scale)
        for k in (1, 20, 1000):
            assert torch.equal(op.get("triton")(logits, k), op.reference(logits, k))
