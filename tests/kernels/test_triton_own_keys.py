"""paged_attention in Triton where a pass's own keys and values come by descriptors.

In the interpreter by test_interpreter.py, and on a GPU where there is one.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from shoal.kernels.registry import load_op
from tests.kernels.test_triton_attention import INTERPRETED, TARGETS, _poisoned, assert_close, make  # noqa: F401

pytest.importorskip("triton")
from shoal.kernels.triton import paged_attention as kernels

halves = pytest.mark.parametrize(
    ("device", "dtype"), [target for target in TARGETS if target.values[1] != torch.float32]
)  # descriptors are for 16-bit values


def own_of(arguments, spare=0) -> list[torch.Tensor]:
    """Keys and values of these rows' query tokens, out of the cache; tokens `spare` values apart, by NaN."""
    _, keys, values, starts, seq_lens, tables, *_ = arguments
    block_size, kv_heads, size = keys.shape[1:]
    found = []
    for cache in (keys, values):
        wide = cache.new_full((int(starts[-1]), kv_heads * size + spare), float("nan"))
        for row, (first, last) in enumerate(pairwise(starts.tolist())):
            length = int(seq_lens[row])
            positions = torch.arange(length - last + first, length, device=keys.device)
            slots = tables[row, positions // block_size].long() * block_size + positions % block_size
            wide[first:last, : kv_heads * size] = cache.flatten(0, 1)[slots].flatten(1)
        found.append(wide[:, : kv_heads * size].unflatten(1, (kv_heads, size)))
    return found


@pytest.fixture
def by_descriptors(monkeypatch) -> list[str]:
    """Which rows kernels served that are not those of decoding rows; no pass is too small for descriptors."""
    monkeypatch.setattr(kernels, "_OWN_LEAST", 1)
    served, inner = [], kernels.prefill

    def noted(*arguments):
        served.append(arguments[8])
        inner(*arguments)

    monkeypatch.setattr(kernels, "prefill", noted)
    return served


ROWS_WITH_OWN = (
    [(33, 33), (2, 100), (64, 64), (5, 69)],
    [(1, 70), (90, 120), (1, 3), (0, 9), (32, 32), (31, 64)],
    [(1, 5), (17, 17), (1, 33)],
    [(2, 2)] * 40 + [(3, 5)] * 3,
)


@halves
@pytest.mark.parametrize("rows", ROWS_WITH_OWN)
@pytest.mark.parametrize(("heads", "kv_heads", "block_size"), [(4, 1, 16), (9, 3, 1), (4, 2, 48)])
def test_own_keys_and_values(heads, kv_heads, block_size, rows, device, dtype, by_descriptors) -> None:
    """Rows that begin, go on and end beside a tile's edge."""
    arguments = make(rows, heads, kv_heads, 128, block_size, device=device, dtype=dtype, spare=8)
    expected = load_op("paged_attention").reference(*arguments)
    own = own_of(arguments, spare=8)
    keys, values, tables = arguments[1], arguments[2], arguments[5]
    for row, (tokens, context) in enumerate(rows):
        if tokens == context > 1:  # the cache's own are not asked
            blocks = tables[row, : -(-context // block_size)].long()
            keys[blocks] = values[blocks] = float("nan")
    assert_close(kernels.paged_attention(*arguments, *own), expected)
    assert by_descriptors == ["fresh", "later"]


@halves
def test_own_keys_and_values_of_long_rows(device, dtype, by_descriptors, monkeypatch) -> None:
    """By the other tiles."""
    monkeypatch.setattr(kernels, "OWN_RULES", kernels.OWN_RULES[1:])
    rows = make([(200, 200), (40, 90), (129, 129)], 4, 2, 128, 16, device=device, dtype=dtype)
    assert_close(kernels.paged_attention(*rows, *own_of(rows)), load_op("paged_attention").reference(*rows))
    assert by_descriptors == ["fresh", "later"]


@halves
def test_what_is_not_finite_stays_in_its_row(device, dtype, by_descriptors) -> None:
    rows = make([(40, 40), (9, 9), (33, 33)], 4, 2, 128, 16, device=device, dtype=dtype)
    own = own_of(rows)
    for cache, mine in zip(rows[1:3], own, strict=True):
        cache[rows[5][1, :1].long()] = float("nan")
        mine[40:49] = float("nan")
    found = kernels.paged_attention(*rows, *own)
    expected = load_op("paged_attention").reference(*rows)
    assert_close(found[:40], expected[:40])
    assert_close(found[49:], expected[49:])
    assert found[40:49].isnan().all()
    assert by_descriptors == ["fresh", "later"]


@halves
def test_places_that_descriptors_cannot_have(device, dtype, by_descriptors) -> None:
    """Keys at odd addresses, of other sizes, or not side by side are read from the cache."""
    rows = make([(40, 40), (3, 50)], 4, 2, 128, 16, device=device, dtype=dtype)
    expected = load_op("paged_attention").reference(*rows)
    key, value = own_of(rows)
    shifted = torch.empty(key.numel() + 1, device=device, dtype=dtype)[1:].view(key.shape)
    narrow = torch.empty(43, 2, 132, device=device, dtype=dtype)[:, :, :128]
    for wrong in (shifted, narrow):
        assert_close(kernels.paged_attention(*rows, wrong, value), expected)
        assert_close(kernels.paged_attention(*rows, key, wrong), expected)
    rows = make([(40, 40)], 4, 2, 80, 16, device=device, dtype=dtype)
    assert_close(kernels.paged_attention(*rows, *own_of(rows)), load_op("paged_attention").reference(*rows))
    assert by_descriptors == ["all"] * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("heads", "longest"), [(32, 1024), (16, 3000)])
def test_large_passes_with_decoding_rows(heads, longest) -> None:
    """As the rules have it, with more rows than a program looks at at once."""
    rows = [(1, 700)] * 300 + [(longest, longest)] * ((20 << 10) // longest) + [(1, 90)] * 300 + [(300, 900)]
    arguments = make(rows, heads, 8, 128, 16, device="cuda", dtype=torch.bfloat16)
    own = own_of(arguments)
    assert arguments[0].numel() >= kernels._OWN_LEAST
    assert_close(kernels.paged_attention(*arguments, *own), load_op("paged_attention").reference(*arguments))


def test_a_small_pass_compiles_what_large_ones_launch(monkeypatch) -> None:
    """Kernels are compiled before the first step, when memory for a large pass may not be there."""
    served = []
    monkeypatch.setattr(kernels, "prefill", lambda *arguments: served.append((arguments[8], *arguments[10:])))
    rows = make([(40, 40)], 4, 2, 128, 16, device="cpu", dtype=torch.float16)
    kernels.paged_attention(*rows, *own_of(rows))
    assert served == [("all",)]
    monkeypatch.setattr(kernels, "is_compiling", lambda: True)
    kernels.paged_attention(*rows, *own_of(rows))
    short, long = (config for _, config in kernels.OWN_RULES)
    assert served[1:] == [("all",), ("fresh", short), ("fresh", long), ("later",)]


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("rule", kernels.OWN_RULES, ids=str)
def test_own_rules_fit_a_hopper_gpu(rule, compiled_for_hopper) -> None:
    """In registers too: programs of short rows share a multiprocessor by threes, and long rows' tiles just fit."""
    rows = make([(9, 9)] * 3, 16, 8, 128, 16, device="cpu", dtype=torch.bfloat16)
    out = torch.empty_like(rows[0])
    (kernel,) = compiled_for_hopper(kernels.prefill, *rows[:6], out, 1.0, "fresh", own_of(rows), rule[1])
    assert kernel.metadata.shared <= (227 << 10) // (3 if rule[1].block_m == 64 else 1)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert ".local" not in kernel.asm["ptx"]
