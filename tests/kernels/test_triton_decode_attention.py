"""decode_attention in Triton beyond the op's own cases: real head sizes, rows cut and not, padding, recorded steps.

As in test_triton_attention.py, whose rows these are: in the interpreter by test_interpreter.py, and on a GPU where
there is one. The places of the newest keys and values hold NaN until the op writes them, as does all it must not use.
"""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.registry import load_op

pytest.importorskip("triton")
from shoal.kernels.triton import paged_attention as kernels
from tests.kernels.test_triton_attention import (
    INTERPRETED,
    assert_close,
    everywhere,
    for_the_interpreter,
    is_pipelined,
    make,
    shaped,
    skip_half,
)

OP = load_op("decode_attention")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    if INTERPRETED:
        monkeypatch.setattr(kernels, "_ROWS", 32)  # few rows are then more than a program looks at at once
        monkeypatch.setattr(kernels, "_PADS", 2)


def step(lengths, heads, kv_heads, size, block_size, *, normed, device, dtype, spare=0):
    """Arguments of the op for rows of these lengths, 0 for padding; projections `spare` values apart."""
    generator = torch.Generator().manual_seed(len(lengths))
    rows = [(1, max(1, length)) for length in lengths]
    _, keys, values, _, _, tables, scale, _, longest = make(
        rows, heads, kv_heads, size, block_size, device=device, dtype=dtype
    )
    for row, length in enumerate(lengths):
        last = max(1, length) - 1
        for cache in (keys, values):
            cache[tables[row, last // block_size], last % block_size] = float("nan")
    width = (heads + 2 * kv_heads) * size
    qkv = torch.randn(len(lengths), width + spare, generator=generator).to(device, dtype)[:, :width]
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    qkv[seq_lens == 0] = float("nan")
    angles = torch.randn(longest, size // 2, generator=generator) * 5
    table = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
    # Scores as they are in models: the reference rounds them to the type, which with large ones is more than ours errs.
    weights = (torch.randn(2, size, generator=generator) / 4 + 1).to(device, dtype) if normed else (None, None)
    return qkv, *weights, 1e-6, table, keys, values, seq_lens, tables, scale, 4 * longest, heads


def run(function, arguments):
    """What it returns and the caches that it leaves; the arguments stay as they are."""
    own = list(arguments)
    own[5], own[6] = own[5].clone(), own[6].clone()
    return function(*own), own[5], own[6]


def compare(*arguments, **options) -> None:
    arguments = step(*arguments, **options)
    expected, found = run(OP.reference, arguments), run(kernels.decode_attention, arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.isnan(), b.isnan())
        assert_close(a.nan_to_num(), b.nan_to_num())
    assert not kernels._counters(arguments[0].device).any()


@everywhere
@pytest.mark.parametrize("normed", [True, False])
@shaped
def test_shapes(heads, kv_heads, size, block_size, normed, device, dtype) -> None:
    """Groups of 1 to 32 heads, head sizes that fill their power of two or not."""
    if device == "cpu" and normed == (size == 64):
        pytest.skip("the other shapes have it")
    skip_half(device, dtype)
    shape = for_the_interpreter(device, dtype, heads, kv_heads, size, block_size)
    lengths = (1, 2, 16, 17, 33, 140)
    compare(lengths, *shape, normed=normed, device=device, dtype=dtype)


@everywhere
@pytest.mark.parametrize(
    "lengths", [[1], [128], [257], [700], [400, 1, 300], [1] * 70, [0, 5, 0, 300, 0], [0, 0], [90, 0], [0, 0, 7] * 25]
)
def test_rows_cut_and_whole(lengths, device, dtype) -> None:
    """One long row over all programs; a part with the newest position alone; padding."""
    if sum(lengths) > 128 or len(lengths) > 60:
        skip_half(device, dtype)
    compare(lengths, 4, 2, 16, 16, normed=True, device=device, dtype=dtype, spare=24)


@everywhere
@pytest.mark.parametrize("lengths", [(1, 15, 16, 17, 90, 64, 7), (40, 48, 0, 33, 36), (96, 96)])
def test_any_tile_and_share(lengths, device, dtype, monkeypatch) -> None:
    """Shares that end before a row's first tile; equal rows, whose shares are whole parts of them or not."""
    skip_half(device, dtype)
    for tile, programs, least in ((16, 5, 1), (32, 5, 1), (32, 1, 48), (16, 1, 1)):
        config = kernels.DecodeConfig(tile, 4, 2, programs, least)
        monkeypatch.setattr(kernels, "FUSED_RULES", ((4, 1024, config), (2, 1024, config)))
        compare(lengths, 4, 2, 32, 8, normed=True, device=device, dtype=dtype)


@everywhere
def test_as_the_two_ops_that_it_replaces(device, dtype) -> None:
    """Keys, values and queries are rounded at the same places: what is written is equal to the last bit or nearly."""
    lengths = [1, 40, 63, 64, 65, 150]
    arguments = step(lengths, 4, 2, 128, 16, normed=True, device=device, dtype=dtype)
    qkv, *norms, table, keys, values, seq_lens, tables, scale, longest, heads = arguments
    found, new_keys, new_values = run(kernels.decode_attention, arguments)
    last = seq_lens.long() - 1
    slots = tables.gather(1, (last // 16).unsqueeze(1)).squeeze(1).long() * 16 + last % 16
    query = load_op("qk_norm_rope_store").get("triton")(qkv, *norms, table, last, keys, values, slots, heads)[0]
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    expected = kernels.paged_attention(query, keys, values, starts, seq_lens, tables, scale, 1, longest)
    assert_close(found, expected)
    assert torch.equal(new_values.nan_to_num(), values.nan_to_num())
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(
        new_keys, keys, rtol=2 * spacing, atol=4 * torch.finfo(torch.float32).eps, equal_nan=True
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(16, 8, 128), (32, 8, 128), (32, 8, 64), (8, 4, 256)])
def test_real_sizes(heads, kv_heads, size) -> None:
    generator = torch.Generator().manual_seed(0)
    for count, longest in ((1, 9000), (8, 4096), (16, 700), (200, 1500), (600, 300)):
        lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
        compare(lengths, heads, kv_heads, size, 16, normed=size != 64, device="cuda", dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_follow_the_lengths() -> None:
    """A graph finds other lengths, padding and block tables at each replay."""
    arguments = step([1 + 97 * i for i in range(24)], 16, 8, 128, 16, normed=True, device="cuda", dtype=torch.bfloat16)
    seq_lens, tables = arguments[7:9]
    wanted, order = seq_lens.clone(), tables.clone()
    kernels.decode_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode_attention(*arguments)
    for turn in range(4):
        place = torch.randperm(24, device="cuda")
        seq_lens.copy_(wanted[place])
        tables.copy_(order[place])
        seq_lens[turn * 3 : turn * 5] = 0
        expected, *_ = run(OP.reference, arguments)
        graph.replay()
        assert_close(out, expected)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("rule", kernels.FUSED_RULES, ids=str)
def test_rules_fit_a_hopper_gpu(rule, compiled_for_hopper) -> None:
    """As many programs as the rule says must be there at once."""
    itemsize, largest, config = rule
    size = min(largest, 256 if itemsize == 2 else 128) if largest < 1024 else 512
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    arguments = step([40] * 3, 16, 8, size, 16, normed=True, device="cpu", dtype=dtype)
    (kernel,) = compiled_for_hopper(kernels.decode_attention, *arguments)
    assert is_pipelined(kernel, config)
    if dtype == torch.bfloat16:
        assert kernel.metadata.shared + 1024 <= config.shared_bytes(16, size, 2)
    assert config.programs * (kernel.metadata.shared + 1024) <= 228 << 10
    assert config.programs * config.warps * 32 * config.registers() <= 65536
