"""The decode step's Triton kernels but attention, beyond the ops' own cases: odd shapes, strides, extremes, long loops.

As in test_triton.py: in the interpreter by a process of its own, and on a GPU where there is one. Without either, every
kernel of every op is at least compiled for a Hopper GPU, which finds what the interpreter lets pass.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from shoal.kernels.ops.philox import gumbel_noise
from shoal.kernels.registry import OPS, load_op

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
TARGETS = [
    pytest.param(
        "cpu",
        dtype,
        marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py"),
        id=f"cpu-{dtype}",
    )
    for dtype in (torch.float32, torch.float16)
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
INF = float("inf")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten shows."""

    def fill(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-99)

    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: fill(empty_like(*args, **kwargs)))


def normal(*shape, device, dtype, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def both(name: str, *arguments) -> tuple[Any, Any]:
    op = load_op(name)
    return op.get("triton")(*arguments), op.reference(*arguments)


def close(found, expected, dtype) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=DTYPES[dtype], rtol=DTYPES[dtype], equal_nan=True)


# ---- norms and activations -------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 128), (2, 513), (5, 1000), (2, 2049), (1, 8200)])
def test_norms(rows, size, device, dtype) -> None:
    wide = normal(rows, size + 8, device=device, dtype=dtype) + 3
    x, residual = wide[:, :size], normal(rows, size, device=device, dtype=dtype, seed=1)
    weight, bias = (normal(size, device=device, dtype=dtype, seed=seed) for seed in (2, 3))
    for other in (None, residual):
        found, expected = both("rms_norm", x, weight, 1e-6, other)
        close(found[0], expected[0], dtype)
        close(found[1], expected[1], dtype)
    (found, _), (expected, _) = both("rms_norm", x.unsqueeze(1), weight, 1e-6, None)
    close(found, expected, dtype)
    for affine in ((weight, bias), (weight, None), (None, None)):
        close(*both("layer_norm", x, *affine, 1e-5), dtype)


@everywhere
def test_a_residual_that_is_not_contiguous(device, dtype) -> None:
    x, weight = normal(4, 64, device=device, dtype=dtype), normal(64, device=device, dtype=dtype, seed=1)
    residual = normal(4, 100, device=device, dtype=dtype, seed=2)[:, :64]
    found, expected = both("rms_norm", x, weight, 1e-5, residual)
    close(found[0], expected[0], dtype)
    close(found[1], expected[1], dtype)


@everywhere
@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_activations(name, device, dtype) -> None:
    x = normal(3, 2, 1030, device=device, dtype=dtype, scale=3)
    x[0, 0, :6] = torch.tensor([0.0, -0.0, 200.0, -200.0, 1e4, -1e4], device=device)
    close(*both("activation", x, name), dtype)
    close(*both("activation_and_mul", x, name), dtype)
    halves = x[:, 0].chunk(2, dim=-1)
    close(*both("activation", halves[1], name), dtype)  # rows that lie apart
    close(*both("activation_and_mul", x[:, 1, :700], name), dtype)


@pytest.mark.parametrize("op", ["activation", "activation_and_mul"])
def test_an_unknown_activation(op) -> None:
    with pytest.raises(ValueError, match="unknown activation 'swiglu'"):
        load_op(op).get("triton")(torch.zeros(1, 2), "swiglu")


# ---- queries, keys and values ----------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 128), (5, 1, 64), (6, 3, 6)])
def test_qk_norm_rope_store(heads, kv_heads, size, normed, device, dtype) -> None:
    tokens, block_size, blocks = 6, 4, 5
    width = (heads + 2 * kv_heads) * size
    qkv = normal(tokens, width + 16, device=device, dtype=dtype)[:, :width]
    weights = normal(2, size, device=device, dtype=dtype, seed=1) + 1
    angles = normal(300, size // 2, device=device, dtype=torch.float32, seed=2, scale=5)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1) * 1.5
    positions = torch.tensor([0, 299, 7, 8, 9, 100], device=device)
    slots = torch.tensor([3, -1, 19, 0, -1, 8], device=device)
    # One allocation for keys and values, blocks far apart: only strides tell where a block lies.
    shape = (2, 2, blocks, block_size, kv_heads, size)
    results = []
    for name in ("triton", "reference"):
        caches = torch.full(shape, float("nan"), device=device, dtype=dtype)[1]
        run = load_op("qk_norm_rope_store").get(name)
        query_weight, key_weight = weights if normed else (None, None)
        found = run(qkv, query_weight, key_weight, 1e-6, cos_sin, positions, caches[0], caches[1], slots, heads)
        results.append((*found, caches))
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, dtype)  # NaN in the caches where nothing belongs


@everywhere
def test_no_tokens(device, dtype) -> None:
    caches = torch.zeros(2, 3, 4, 2, 8, device=device, dtype=dtype)
    cos_sin = torch.zeros(4, 8, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    qkv = torch.zeros(0, 8 * 8, device=device, dtype=dtype)
    found, expected = both("qk_norm_rope_store", qkv, None, None, 1e-6, cos_sin, none, *caches, none, 4)
    shapes = [(0, 4, 8), (0, 2, 8), (0, 2, 8)]
    assert [x.shape for x in found] == [x.shape for x in expected] == shapes


# ---- choosing tokens -------------------------------------------------------------------------------------------


def assert_chosen(found, logits, temperature, streams, positions) -> None:
    """Equal to the reference's choice, but where the two best scores are closer than rounding tells apart."""
    scores = logits.float()
    random = (temperature > 0).unsqueeze(1)
    noisy = scores / torch.where(random, temperature.unsqueeze(1), 1.0)
    scores = torch.where(random, noisy + gumbel_noise(streams, positions, logits.shape[1]), scores)
    expected = scores.argmax(dim=-1)
    best, ours = (scores.gather(1, ids.unsqueeze(1)).squeeze(1) for ids in (expected, found))
    near = (temperature > 0) & (best - ours < 1e-4)
    assert ((found == expected) | near).all(), (found, expected)


def draws(rows: int, device: str):
    generator = torch.Generator().manual_seed(rows)
    streams = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return streams.to(device), torch.randint(0, 1 << 20, (rows,), generator=generator).to(device)


@everywhere
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (2, 3), (3, 257), (4, 515), (17, 520), (66, 9)])
def test_sample_rows(rows, vocab, device, dtype) -> None:
    """Flat and steep logits, from a matrix that is wider than the vocabulary."""
    streams, positions = draws(rows, device)
    temperature = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device) * 2
    temperature[1::4] = 0
    temperature[2::4] = 1e-3
    for scale in (0.01, 4.0, 300.0) if rows < 17 else (4.0,):
        logits = normal(rows, vocab + 5, device=device, dtype=dtype, scale=scale)
        logits[:, vocab:] = 1e4  # not of the vocabulary
        logits = logits[:, :vocab]
        assert_chosen(load_op("sample_rows").get("triton")(logits, temperature, streams, positions), logits,
                      temperature, streams, positions)  # fmt: skip
        assert torch.equal(load_op("greedy").get("triton")(logits), logits.float().argmax(dim=-1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 8, 24, 72, 160])
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(151936, torch.bfloat16), (128256, torch.float32), (50257, torch.float16)]
)
def test_sample_rows_of_real_size(rows, vocab, dtype) -> None:
    streams, positions = draws(rows, "cuda")
    temperature = torch.linspace(0, 1.5, rows, device="cuda")
    for scale in (0.02, 3.0, 40.0):
        logits = normal(rows, vocab, device="cuda", dtype=dtype, scale=scale)
        assert_chosen(load_op("sample_rows").get("triton")(logits, temperature, streams, positions), logits,
                      temperature, streams, positions)  # fmt: skip
        ids = load_op("greedy").get("triton")(logits)
        assert torch.equal(logits.gather(1, ids.unsqueeze(1)).squeeze(1), logits.amax(dim=1))
        found, expected = both("logprobs_of", logits, torch.stack([ids, ids * 0, positions % vocab], dim=1))
        torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
        assert torch.equal(found[1], expected[1])


@everywhere
def test_sampling_where_few_ids_are_left(device, dtype) -> None:
    """-inf is never chosen while anything else is there; of nothing but -inf, id 0 is; of equals, the lowest."""
    logits = torch.full((6, 1100), -INF, device=device, dtype=dtype)
    logits[0, 1034] = -50
    logits[1, 600:610] = 2
    logits[2, 3] = logits[2, 1099] = 7
    logits[4] = 1
    streams, positions = draws(6, device)
    for temperature in (0.0, 0.7):
        temperatures = torch.full((6,), temperature, device=device)
        found = load_op("sample_rows").get("triton")(logits, temperatures, streams, positions)
        assert_chosen(found, logits, temperatures, streams, positions)
        assert found[[0, 3, 5]].tolist() == [1034, 0, 0]
    assert load_op("greedy").get("triton")(logits).tolist() == [1034, 600, 3, 0, 0, 0]


@everywhere
@pytest.mark.parametrize("slope", [0.05, -0.05])
def test_logits_that_keep_rising(slope, device, dtype) -> None:
    """The best so far changes at nearly every step: the order of ids must not matter."""
    logits = (torch.arange(1100, device=device) * slope).to(dtype).repeat(2, 1)
    streams, positions = draws(2, device)
    temperature = torch.tensor([0.1, 3.0], device=device)
    found = load_op("sample_rows").get("triton")(logits, temperature, streams, positions)
    assert_chosen(found, logits, temperature, streams, positions)


@everywhere
def test_sample_with_min_p(device, dtype) -> None:
    rows, vocab = 6, 700
    logits = normal(rows, vocab, device=device, dtype=dtype, scale=3)
    logits[:, 5] = logits.amax(dim=1)  # two best ids, so that min_p 1 leaves a choice
    streams, positions = draws(rows, device)
    temperature = torch.tensor([0.3, 0.9, 1.7] * 2, device=device)
    log_min_p = torch.tensor([0.0, 0.0, -0.5, -0.5, -3.0, -INF], device=device)
    found, expected = both("sample", logits, temperature, log_min_p, streams, positions)
    assert torch.equal(found, expected)
    scaled = logits.float() / temperature.unsqueeze(1)
    chosen = scaled.gather(1, found.unsqueeze(1)).squeeze(1)
    assert (chosen >= scaled.amax(dim=1) + log_min_p).all()
    found, expected = both("sample", logits, temperature, None, streams, positions)
    assert torch.equal(found, expected)


# ---- log-probabilities -----------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(("vocab", "width"), [(1, 1), (300, 300), (4096, 2), (9001, 7)])
def test_logprobs_of(vocab, width, device, dtype) -> None:
    logits = normal(3, vocab + 3, device=device, dtype=dtype, scale=6)[:, :vocab]
    ids = torch.randint(0, vocab, (3, width + 1), generator=torch.Generator().manual_seed(0)).to(device)[:, :width]
    ids[0, 0] = logits[0].argmax()
    found, expected = both("logprobs_of", logits, ids)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], expected[1])
    assert found[1].dtype == torch.int32
    assert found[1][0] == (logits[0] == logits[0].max()).sum()


@everywhere
def test_logprobs_where_most_is_ruled_out(device, dtype) -> None:
    logits = torch.full((2, 8200), -INF, device=device, dtype=dtype)
    logits[0, 8199] = 3
    logits[1, 10:12] = 60000  # exp overflows unless the maximum goes first
    ids = torch.tensor([[8199, 0], [11, 8199]], device=device)
    logprobs, ranks = load_op("logprobs_of").get("triton")(logits, ids)
    expected = torch.tensor([[0, -INF], [-0.6931472, -INF]], device=device)
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)
    assert ranks.tolist() == [1, 2]


# ---- the persistent batch --------------------------------------------------------------------------------------


def make_batch(device: str, rows: int, length: int, block_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-length // block_size)
    return {
        "token_ids": torch.randint(0, 99, (rows, length), generator=generator, dtype=torch.int32).to(device),
        "num_tokens": torch.randint(1, length - 8, (rows,), generator=generator, dtype=torch.int32).to(device),
        "block_tables": torch.randperm(rows * blocks, generator=generator).view(rows, blocks).int().to(device),
        "ended": torch.zeros(rows, dtype=torch.bool, device=device),
        "min_tokens": torch.tensor([0, 2] * (rows // 2), device=device),
        "stop_ids": torch.tensor([[50, 51, -1]] * rows, device=device),
    }


def decode(implementation: str, device: str, block_size: int, blocks: int) -> list[list[torch.Tensor]]:
    """Four decode steps; everything they write, after each."""
    prepare, append = (load_op(name).get(implementation) for name in ("prepare_decode", "append_decode"))
    batch = make_batch(device, 8, blocks * block_size, block_size)
    batch["num_tokens"][0], batch["num_tokens"][1] = 1, blocks * block_size - 5
    prompts = batch["num_tokens"] - 1
    batch["ended"][6] = True
    rows = torch.tensor([3, -1, 0, 6, 1, 7, -1], device=device)
    longs = [torch.full((7,), -7, device=device) for _ in range(3)]
    seq_lens, out = (torch.full((7,), -7, dtype=torch.int32, device=device) for _ in range(2))
    tables = torch.full((7, blocks), -7, dtype=torch.int32, device=device)
    state = [batch[name] for name in ("token_ids", "num_tokens", "block_tables", "ended")]
    temperatures, streams = torch.arange(8, device=device) * 0.3, torch.arange(8, device=device) << 40
    found = [torch.full((7,), -7.0, device=device), *(torch.full((7,), -7, device=device) for _ in range(2))]
    history = []
    for step in range(4):
        prepare(rows, *state, block_size, *longs, seq_lens, tables, prompts, temperatures, streams, *found)
        sampled = torch.tensor([50, 50, 60 + step, 50, 51 if step == 2 else 9, 50, 3], device=device)
        append(
            rows, sampled, batch["token_ids"], batch["num_tokens"], prompts, batch["min_tokens"], batch["stop_ids"],
            batch["ended"], out,
        )  # fmt: skip
        history.append([t.clone() for t in (*state, *longs, seq_lens, tables, *found, out)])
    return history


@pytest.mark.parametrize(("device", "dtype"), [p for p in TARGETS if "float32" in p.id])
@pytest.mark.parametrize(("block_size", "blocks"), [(1, 700), (16, 3)])
def test_decode_steps(block_size, blocks, device, dtype) -> None:
    """Rows that are padding, end, had ended, or would end were min_tokens less; tables longer than one load."""
    found, expected = (decode(name, device, block_size, blocks) for name in ("triton", "reference"))
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), step
    assert found[-1][3].tolist() == [False, True, False, True, False, False, True, True]


# ---- where there is neither interpreter nor GPU ----------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("name", [name for name in OPS if "triton" in load_op(name).implementations])
def test_compiles_for_hopper(name, compiled_for_hopper) -> None:
    run = load_op(name).get("triton")
    keep_wide = {
        "sample_rows": (1,),
        "best_of_part": (1,),
        "sample": (1, 2),
        "sample_nucleus": (1, 2),
        "sample_filtered": (1, 2),
        "qk_norm_rope_store": (4,),
        "decode_attention": (4,),
        "penalise": (0, 4),
    }.get(name, ())
    for case in [case for case in load_op(name).cases() if case[0].numel()][-2:]:
        half = [
            v.bfloat16() if isinstance(v, torch.Tensor) and v.dtype == torch.float32 and i not in keep_wide else v
            for i, v in enumerate(case)
        ]
        compiled_for_hopper(run, *half)
