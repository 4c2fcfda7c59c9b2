"""sample_nucleus in Triton against its reference.

In the interpreter by test_interpreter.py, and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.ops.philox import gumbel_noise
from shoal.kernels.registry import load_op
from tests.kernels.test_triton_top_ids import INF, _poisoned, everywhere, normal, on_a_gpu  # noqa: F401

TOP_P = (0.9, 0.3, 0.999, 1e-9, 0.6)


def streams_of(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    streams = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return streams.to(device), torch.randint(0, 1 << 20, (rows,), generator=generator).to(device)


def wishes(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """temperature and top_p that differ from row to row, as columns of a table."""
    row = torch.arange(rows, device=device)
    top_p = torch.tensor(TOP_P, dtype=torch.float64, device=device)[row % len(TOP_P)]
    table = torch.stack([0.4 + 0.3 * (row % 7), top_p], dim=1)
    return table[:, 0].to(torch.float32), table[:, 1]


def assert_same(found, reference, logits, temperature, streams, positions) -> None:
    """Equal to reference(1) but where rounding may decide: top_p within 1e-6 of a boundary, noise within 1e-4.

    `reference` takes a factor of top_p.
    """
    expected = reference(1.0)
    assert found.dtype == torch.int64
    for row in (found != expected).nonzero().flatten().tolist():
        near = [int(reference(1 + e)[row]) for e in (-1e-6, 1e-6)]
        noise = gumbel_noise(streams[row : row + 1], positions[row : row + 1], logits.shape[1])[0]
        scores = logits[row].float() / temperature[row] + noise
        close = abs(float(scores[found[row]] - scores[expected[row]])) < 1e-4
        assert int(found[row]) in near or close, (row, int(found[row]), int(expected[row]))


def assert_drawn(logits, temperature, log_min_p, top_p) -> torch.Tensor:
    """What Triton draws, once compared."""
    op = load_op("sample_nucleus")
    draws = streams_of(len(logits), logits.device.type)
    found = op.get("triton")(logits, temperature, log_min_p, top_p, *draws)

    def reference(factor):
        return op.reference(logits, temperature, log_min_p, (top_p * factor).clamp(max=1), *draws)

    assert_same(found, reference, logits, temperature, *draws)
    return found


@everywhere
@pytest.mark.parametrize(("vocab", "chunk"), [(1, 8192), (33, 8192), (700, 256)])
def test_every_kind_of_row(vocab, chunk, device, dtype, monkeypatch) -> None:
    """Peaked and flat rows, ties (float16 and rounded logits), sorted rows, with min_p and without."""
    from shoal.kernels.triton import sample_nucleus

    monkeypatch.setattr(sample_nucleus, "_CHUNK", chunk)
    monkeypatch.setattr(sample_nucleus, "_TILE", min(1024, chunk // 2))
    rows = 8
    row = torch.arange(rows, device=device)
    logits = normal(rows, vocab + 3, device=device) * torch.tensor([4.0, 0.02, 1.0], device=device)[row % 3, None]
    logits[::4] = logits[::4].round()
    logits[1::4] = logits[1::4].sort(dim=1).values
    logits[2::8] = logits[2::8].sort(dim=1, descending=True).values
    logits[:, vocab:] = 1000  # not of the vocabulary
    logits = logits.to(dtype)[:, :vocab]
    temperature, top_p = wishes(rows, device)
    log_min_p = torch.tensor([-INF, -3.0, -0.01, -9.0], device=device)[row % 4]
    assert_drawn(logits, temperature, None, top_p)
    assert_drawn(logits, temperature, log_min_p, top_p.flip(0))


@everywhere
def test_equals_go_by_id(device, dtype, monkeypatch) -> None:
    """All logits equal, or two kinds of them: the lowest ids are kept, exactly as many as top_p says, of any chunk."""
    from shoal.kernels.triton import sample_nucleus

    monkeypatch.setattr(sample_nucleus, "_CHUNK", 128)
    monkeypatch.setattr(sample_nucleus, "_TILE", 64)
    rows, vocab = 24, 330
    logits = torch.zeros(rows, vocab, device=device, dtype=dtype)
    logits[rows // 2 :, 250:] = -INF
    one = torch.ones(rows, device=device)
    top_p = torch.full((rows,), 5.5 / vocab, dtype=torch.float64, device=device)
    top_p[1::2] = 190.5 / vocab
    found = assert_drawn(logits, one, None, top_p)
    assert set(found[: rows // 2 : 2].tolist()) <= set(range(6))
    assert len(set(found[: rows // 2 : 2].tolist())) > 2
    assert found[1 : rows // 2 : 2].max() <= 190
    assert found[1 : rows // 2 : 2].max() > 127, "of a later chunk"
    assert found[rows // 2 + 1 :: 2].max() <= 250 * 190.5 / vocab


@everywhere
def test_most_is_ruled_out(device, dtype) -> None:
    """allowed_token_ids and the like leave -inf nearly everywhere, or everywhere."""
    rows, vocab = 10, 700
    logits = torch.full((rows, vocab), -INF, device=device, dtype=dtype)
    logits[:, 650] = 1
    logits[::2, 7] = 2
    temperature, top_p = wishes(rows, device)
    found = assert_drawn(logits, temperature, None, top_p)
    assert set(found.tolist()) <= {7, 650}
    nothing = torch.full_like(logits, -INF)
    for log_min_p in (None, torch.full((rows,), -1.0, device=device)):
        run = load_op("sample_nucleus").get("triton")
        assert run(nothing, temperature, log_min_p, top_p, *streams_of(rows, device)).tolist() == [0] * rows


@everywhere
def test_nan_gives_an_id(device, dtype) -> None:
    logits = normal(10, 700, device=device, dtype=dtype)
    logits[:5] = float("nan")
    logits[5:, ::2] = -torch.tensor(float("nan"))
    temperature, top_p = wishes(10, device)
    found = load_op("sample_nucleus").get("triton")(logits, temperature, None, top_p, *streams_of(10, device))
    assert ((found >= 0) & (found < 700)).all()
    assert (found[5:] % 2 == 1).all()


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rows", [1, 60, 260])
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(151936, torch.bfloat16), (128256, torch.float32), (50257, torch.float16)]
)
def test_real_sizes(rows, vocab, dtype) -> None:
    temperature, top_p = wishes(rows, "cuda")
    for scale in (0.02, 3.0):
        logits = normal(rows, vocab, device="cuda", dtype=dtype, scale=scale)
        assert_drawn(logits, temperature, None, top_p)
        assert_drawn(logits, temperature, torch.full_like(temperature, -4.0), top_p)


@pytest.mark.gpu
@on_a_gpu
def test_graphs_may_record_it() -> None:
    logits = normal(9, 30000, device="cuda", dtype=torch.bfloat16, scale=3)
    temperature, top_p = wishes(9, "cuda")
    run, draws = load_op("sample_nucleus").get("triton"), streams_of(9, "cuda")
    wanted = run(logits, temperature, None, top_p, *draws)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(logits, temperature, None, top_p, *draws)
    for _ in range(2):
        graph.replay()
        assert torch.equal(recorded, wanted)
