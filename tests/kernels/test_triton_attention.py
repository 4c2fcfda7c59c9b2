"""paged_attention in Triton beyond the op's own cases: real head sizes, rows cut and not, mixed passes, strides.

As in test_triton_ops.py: in the interpreter by a process of its own, on a GPU where there is one, and compiled for a
Hopper GPU without either. Whatever a kernel must not use is NaN, or a block id far outside the cache.
"""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch

from shoal.kernels.registry import load_op

pytest.importorskip("triton")
from shoal.kernels.triton import paged_attention as kernels

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
SHAPES = (  # heads, KV heads, head size, block size
    *((16, 8, 128, 16), (32, 8, 128, 64), (32, 8, 64, 16), (9, 3, 64, 1), (3, 1, 80, 16), (32, 1, 16, 64)),
    *((4, 2, 128, 1), (2, 1, 256, 8)),
)
_TWICE = SHAPES[:1] + SHAPES[4:5]  # in the interpreter, which takes seconds for each, with both types


def for_the_interpreter(device, dtype, heads, kv_heads, size, block_size):
    """Programs of the interpreter run one after the other, and those of other KV heads do the same again."""
    if device == "cpu" and dtype == torch.float16 and (heads, kv_heads, size, block_size) not in _TWICE:
        pytest.skip("float32 has this shape")
    fewer = 4 if device == "cpu" and kv_heads == 8 else 1
    return heads // fewer, kv_heads // fewer, size, block_size


def skip_half(device, dtype) -> None:
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("float32 has these lengths")


shaped = pytest.mark.parametrize(("heads", "kv_heads", "size", "block_size"), SHAPES)


def make(rows, heads, kv_heads, size, block_size, *, device, dtype, spare=0):
    """Arguments of the op for rows of (query tokens, context); queries `spare` values apart."""
    generator = torch.Generator().manual_seed(len(rows))
    needs = [-(-context // block_size) for _, context in rows]
    ids = torch.randperm(sum(needs) + 2, generator=generator).int()
    caches = torch.full((2, len(ids), block_size, kv_heads, size), float("nan"))
    tables = torch.full((len(rows), max(needs) + 3), 1 << 30, dtype=torch.int32)
    for row, (_, context) in enumerate(rows):
        mine = ids[sum(needs[:row]) :][: needs[row]]
        tables[row, : needs[row]] = mine
        slots = (mine.long()[:, None] * block_size + torch.arange(block_size)).view(-1)[:context]
        caches.flatten(1, 2)[:, slots] = torch.randn(2, context, kv_heads, size, generator=generator)
    starts = torch.tensor([0, *(tokens for tokens, _ in rows)]).cumsum(0).int()
    seq_lens = torch.tensor([context for _, context in rows], dtype=torch.int32)
    query = torch.randn(int(starts[-1]), heads * size + spare, generator=generator).to(device, dtype)
    query = query[:, : heads * size].unflatten(1, (heads, size))
    caches = caches.to(device, dtype)
    longest = (max(tokens for tokens, _ in rows), max(context for _, context in rows))
    return query, *caches, starts.to(device), seq_lens.to(device), tables.to(device), size**-0.5, *longest


def assert_close(found, expected) -> None:
    tolerance = DTYPES[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def compare(rows, *shape, **options) -> None:
    """With a bound on lengths that is too high, as recorded steps have it, and poison in memory not yet written."""
    arguments = make(rows, *shape, **options)
    expected = load_op("paged_attention").reference(*arguments)
    assert_close(kernels.paged_attention(*arguments[:-1], 4 * arguments[-1]), expected)
    if 1 not in (tokens for tokens, _ in rows):  # nothing was cut, so nothing was counted
        return
    counters = kernels._counters(arguments[0].device)
    assert not counters.any()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    if INTERPRETED:
        monkeypatch.setattr(kernels, "_ROWS", 32)  # few rows are then more than a program looks at at once
        monkeypatch.setattr(kernels, "_PADS", 2)


# ---- rows that decode ------------------------------------------------------------------------------------------


@everywhere
@shaped
def test_decode(heads, kv_heads, size, block_size, device, dtype) -> None:
    shape = for_the_interpreter(device, dtype, heads, kv_heads, size, block_size)
    rows = [(1, length) for length in (1, 31, 32, 33, 63, 64, 65, 200)]
    compare(rows, *shape, device=device, dtype=dtype)


@everywhere
@pytest.mark.parametrize("lengths", [[1], [255], [256], [1500], [700, 1, 900], [1200] * 3, [64] * 40, [1] * 70])
def test_rows_cut_and_whole(lengths, device, dtype) -> None:
    """One long row over all programs; rows that end where a share does; more rows than a program looks at at once."""
    if sum(lengths) > 256 or len(lengths) > 60:
        skip_half(device, dtype)
    compare([(1, length) for length in lengths], 4, 2, 16, 16, device=device, dtype=dtype, spare=24)


@everywhere
@pytest.mark.parametrize("lengths", [(1, 15, 16, 17, 130, 64, 7), (96, 96, 96), (700,)])
def test_any_tile_and_share(lengths, device, dtype) -> None:
    """The same rows, cut at other places; equally long ones between their tiles too; one into more parts than are
    added up at once."""
    skip_half(device, dtype)
    rows = make([(1, length) for length in lengths], 4, 2, 32, 8, device=device, dtype=dtype)
    expected = load_op("paged_attention").reference(*rows)
    for tile in (16, 32):
        for programs in (1, 2, 5):
            for least in (1, 48):
                config = kernels.DecodeConfig(tile, 4, 2, programs, least)
                out = torch.empty_like(expected)
                kernels.decode(*rows[:6], out, rows[6] * kernels._LOG2E, 999, mixed=False, config=config)
                assert_close(out, expected)


@everywhere
@pytest.mark.parametrize("lengths", [[0, 5, 0, 0, 400, 0], [0, 0, 0], [90, 0], [0] * 30 + [3]])
def test_padding(lengths, device, dtype) -> None:
    """Rows of a recorded step that serve nobody have length 0, and give zeros."""
    query, *rest = make([(1, max(1, length)) for length in lengths], 4, 2, 16, 16, device=device, dtype=dtype)
    expected = load_op("paged_attention").reference(query, *rest)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    expected[seq_lens == 0] = 0
    query[seq_lens == 0] = float("nan")
    rest[4 - 1] = seq_lens
    assert_close(kernels.paged_attention(query, *rest), expected)


@everywhere
def test_the_same_twice(device, dtype) -> None:
    """Bit for bit, whichever program comes last."""
    skip_half(device, dtype)
    rows = make([(1, 900), (1, 333), (1, 2000)], 4, 2, 32, 16, device=device, dtype=dtype)
    first = kernels.paged_attention(*rows)
    for _ in range(1 if device == "cpu" else 50):
        assert torch.equal(kernels.paged_attention(*rows), first)


# ---- rows of many query tokens, and both together --------------------------------------------------------------


@everywhere
@shaped
def test_prefill(heads, kv_heads, size, block_size, device, dtype) -> None:
    """Fresh prompts, prefix hits, chunks that end at a tile's edge and beside it."""
    shape = for_the_interpreter(device, dtype, heads, kv_heads, size, block_size)
    rows = [(33, 33), (2, 100), (64, 64), (5, 69)]
    compare(rows, *shape, device=device, dtype=dtype)
    compare([(40, 105)], *shape, device=device, dtype=dtype, spare=16)


@everywhere
@pytest.mark.parametrize(
    "rows",
    [
        [(1, 300), (40, 40), (1, 1), (1, 64), (3, 300), (1, 500)],
        [(1, 70)] * 9 + [(90, 120)],
        [(0, 9), (1, 70), (0, 5), (2, 2), (0, 40)],
        [(20, 20)] + [(1, 5)] * 2,
        [(2, 5)] * 70,
        [(1, 3), (2, 4)] * 60,
        [(0, 7), (1, 5), (1, 90), (0, 1)],
    ],
)
def test_mixed(rows, device, dtype) -> None:
    """More short rows than there are programs, too; of a row without query tokens nothing is written."""
    if len(rows) > 60:
        skip_half(device, dtype)
    compare(rows, 4, 2, 16, 16, device=device, dtype=dtype, spare=8)


@everywhere
def test_chunks_give_what_the_whole_prompt_gives(device, dtype) -> None:
    query, keys, values, _, _, table, scale, _, longest = make([(150, 150)], 4, 2, 64, 16, device=device, dtype=dtype)

    def run(first, last):
        starts, length = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, last - first], [last]))
        return kernels.paged_attention(
            query[first:last], keys, values, starts, length, table, scale, last - first, longest
        )  # fmt: skip

    whole = run(0, 150)
    edges = (0, 1, 64, 65, 128, 149, 150)
    parts = [run(first, last) for first, last in pairwise(edges)]
    assert_close(torch.cat(parts), whole)


@everywhere
def test_queries_inside_a_wider_matrix_by_head(device, dtype) -> None:
    """Heads far apart, and values that are not neighbours."""
    query, *rest = make([(1, 40), (7, 20)], 4, 2, 16, 16, device=device, dtype=dtype)
    expected = load_op("paged_attention").reference(query, *rest)
    apart = query.new_full((8, 4, 32), float("nan"))
    apart[:, :, :16] = query
    assert_close(kernels.paged_attention(apart[:, :, :16], *rest), expected)
    assert_close(kernels.paged_attention(query.transpose(1, 2).contiguous().transpose(1, 2), *rest), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(16, 8, 128), (32, 8, 128), (32, 8, 64)])
def test_real_sizes(heads, kv_heads, size, block_size) -> None:
    generator = torch.Generator().manual_seed(0)
    for count, longest in ((1, 9000), (8, 4096), (200, 1500), (600, 300)):
        lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
        for dtype in (torch.bfloat16, torch.float16):
            options = {"device": "cuda", "dtype": dtype}
            compare([(1, length) for length in lengths], heads, kv_heads, size, block_size, **options)
            mixed = [(1, length) for length in lengths] + [(1000, 1000), (300, 2300)]
            compare(mixed, heads, kv_heads, size, block_size, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_follow_the_lengths() -> None:
    """A graph finds other lengths, padding and block tables at each replay."""
    rows = make([(1, 1 + 97 * i) for i in range(24)], 16, 8, 128, 16, device="cuda", dtype=torch.bfloat16)
    seq_lens, tables = rows[4], rows[5]
    wanted, order = seq_lens.clone(), tables.clone()
    kernels.paged_attention(*rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.paged_attention(*rows)
    for turn in range(4):
        place = torch.randperm(24, device="cuda")
        seq_lens.copy_(wanted[place])
        tables.copy_(order[place])
        expected = load_op("paged_attention").reference(*rows)
        seq_lens[turn * 3 : turn * 5] = 0
        expected[turn * 3 : turn * 5] = 0
        graph.replay()
        assert_close(out, expected)


# ---- where there is neither interpreter nor GPU ----------------------------------------------------------------


def on_hopper(rule, rules):
    """A shape that takes this row of a table, in its dtype."""
    itemsize, largest, _ = rule
    size = min(largest, 256 if itemsize == 2 else 128) if largest < 1024 else 512
    rows = [(1, 40)] * 3 if rules is kernels.DECODE_RULES else [(9, 40)] * 3
    return make(rows, 16, 8, size, 16, device="cpu", dtype=torch.bfloat16 if itemsize == 2 else torch.float32)


def is_pipelined(kernel, config) -> bool:
    """Whether keys and values are on their way while earlier ones are used, if the config asks for that."""
    copies = kernel.asm["ttgir"].count("async_copy_global_to_local")  # each once in a loop, and stages - 1 times before
    least = 2 * config.stages if config.stages > 1 else 0
    return kernel.metadata.num_stages == config.stages and least <= copies and (least > 0) == (copies > 0)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("rule", kernels.DECODE_RULES, ids=str)
def test_decode_rules_fit_a_hopper_gpu(rule, compiled_for_hopper) -> None:
    """As many programs as the rule says must be there at once."""
    rows, config = on_hopper(rule, kernels.DECODE_RULES), rule[2]
    (kernel,) = compiled_for_hopper(kernels.paged_attention, *rows)
    assert is_pipelined(kernel, config)
    if rows[0].dtype == torch.bfloat16:
        assert kernel.metadata.shared + 1024 <= config.shared_bytes(16, rows[0].shape[2], 2)
    assert config.programs * (kernel.metadata.shared + 1024) <= 228 << 10
    assert config.programs * config.warps * 32 * config.registers() <= 65536


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("rule", kernels.PREFILL_RULES, ids=str)
def test_prefill_rules_fit_a_hopper_gpu(rule, compiled_for_hopper) -> None:
    rows = on_hopper(rule, kernels.PREFILL_RULES)
    (kernel,) = compiled_for_hopper(kernels.paged_attention, *rows)
    assert is_pipelined(kernel, rule[2])
    assert kernel.metadata.shared <= 227 << 10
    if rule[0] == 2 and rule[1] <= 128:
        assert "wgmma.mma_async" in kernel.asm["ptx"]


def test_a_head_that_is_too_large() -> None:
    with pytest.raises(ValueError, match="head_dim 2048"):
        kernels.rule(kernels.DECODE_RULES, torch.float32, 2048)
