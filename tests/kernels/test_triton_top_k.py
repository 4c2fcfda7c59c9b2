"""sample_filtered in Triton, where a small top_k bounds every row, against its reference.

In the interpreter by test_interpreter.py, and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.registry import load_op
from tests.kernels.test_triton_nucleus import assert_same, streams_of
from tests.kernels.test_triton_top_ids import INF, _poisoned, everywhere, normal, on_a_gpu, set_capacity  # noqa: F401

TOP_P = (1.0, 0.9, 0.3, 0.999, 1e-9)


def wishes(rows: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """temperature, top_k and top_p that differ from row to row, the latter as columns of tables; top_k from 1 to k."""
    row = torch.arange(rows, device=device)
    top_p = torch.tensor(TOP_P, dtype=torch.float64, device=device)[row % len(TOP_P)]
    top_k = torch.where(row % 3 == 0, k, 1 + row * 7 % k)
    return 0.4 + 0.3 * (row % 7), torch.stack([row, top_k], dim=1)[:, 1], torch.stack([top_p, top_p / 2], dim=1)[:, 0]


def assert_drawn(logits, temperature, log_min_p, top_k, top_p, k) -> torch.Tensor:
    """What Triton draws, once compared."""
    op = load_op("sample_filtered")
    draws = streams_of(len(logits), logits.device.type)
    found = op.get("triton")(logits, temperature, log_min_p, top_k, top_p, *draws, k)

    def reference(factor):
        wider = torch.where(top_p < 1, (top_p * factor).clamp(max=1), 1.0)
        return op.reference(logits, temperature, log_min_p, top_k, wider, *draws, k)

    assert_same(found, reference, logits, temperature, *draws)
    return found


@everywhere
@pytest.mark.parametrize("capacity", [4096, 16], ids=["collected", "overflowing"])
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (40, 33), (1000, 20)])
def test_every_kind_of_row(vocab, k, capacity, device, dtype, monkeypatch) -> None:
    """Peaked and flat rows, ties (float16 and rounded logits), rows of one value, with min_p and without."""
    set_capacity(monkeypatch, capacity)
    rows = 6
    row = torch.arange(rows, device=device)
    logits = normal(rows, vocab + 3, device=device) * torch.tensor([4.0, 0.02, 1.0], device=device)[row % 3, None]
    logits[::4] = logits[::4].round()
    logits[1] = 0
    logits[1, ::2] = -0.0
    logits[:, vocab:] = 1000  # not of the vocabulary
    logits = logits.to(dtype)[:, :vocab]
    temperature, top_k, top_p = wishes(rows, k, device)
    log_min_p = torch.tensor([-INF, -3.0, -0.01, -9.0], device=device)[row % 4]
    assert_drawn(logits, temperature, None, top_k, top_p, k)
    assert_drawn(logits, temperature, log_min_p, top_k, top_p.flip(0), k)


@everywhere
def test_only_the_best_are_drawn(device, dtype) -> None:
    """All logits equal: the lowest ids are the best, as many as top_k and top_p say."""
    rows, vocab = 24, 100
    logits = torch.zeros(rows, vocab, device=device, dtype=dtype)
    one = torch.ones(rows, device=device)
    top_k = torch.full((rows,), 10, dtype=torch.int64, device=device)
    top_p = torch.ones(rows, dtype=torch.float64, device=device)
    top_p[1::2] = 0.35
    found = assert_drawn(logits, one, None, top_k, top_p, 12)
    assert found[::2].max() == 9
    assert found[1::2].max() == 3


@everywhere
def test_most_is_ruled_out(device, dtype) -> None:
    """allowed_token_ids and the like leave -inf nearly everywhere, or everywhere; NaN is drawn only as the last way."""
    rows, vocab = 4, 700
    logits = torch.full((rows, vocab), -INF, device=device, dtype=dtype)
    logits[:, 650] = 1
    logits[::2, 7] = 2
    logits[:, 9] = float("nan")
    temperature, top_k, top_p = wishes(rows, 5, device)
    run, draws = load_op("sample_filtered").get("triton"), streams_of(rows, device)
    found = run(logits, temperature, None, top_k, top_p, *draws, 5).tolist()
    assert set(found) == {7, 650}
    assert found == run(logits.nan_to_num(-INF, neginf=-INF), temperature, None, top_k, top_p, *draws, 5).tolist()
    nothing = torch.full_like(logits, -INF)
    for log_min_p in (None, torch.full((rows,), -1.0, device=device)):
        assert run(nothing, temperature, log_min_p, top_k, top_p, *draws, 5).tolist() == [0] * rows


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rows", [1, 60, 260])
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(151936, torch.bfloat16), (128256, torch.float32), (50257, torch.float16)]
)
def test_real_sizes(rows, vocab, dtype) -> None:
    for scale in (0.02, 3.0):
        logits = normal(rows, vocab, device="cuda", dtype=dtype, scale=scale)
        for k in (1, 20, 1000):
            temperature, top_k, top_p = wishes(rows, k, "cuda")
            assert_drawn(logits, temperature, None, top_k, top_p, k)
            assert_drawn(logits, temperature, torch.full_like(temperature, -4.0), top_k, top_p, k)


@pytest.mark.gpu
@on_a_gpu
def test_graphs_may_record_it() -> None:
    logits = normal(9, 30000, device="cuda", dtype=torch.bfloat16, scale=3)
    temperature, top_k, top_p = wishes(9, 20, "cuda")
    run, draws = load_op("sample_filtered").get("triton"), streams_of(9, "cuda")
    wanted = run(logits, temperature, None, top_k, top_p, *draws, 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(logits, temperature, None, top_k, top_p, *draws, 20)
    for _ in range(2):
        graph.replay()
        assert torch.equal(recorded, wanted)
