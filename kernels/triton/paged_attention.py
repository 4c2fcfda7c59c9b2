"""paged_attention and decode_attention in Triton: one kernel for rows that decode, others for the rest."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from shoal.kernels.triton.attention_decode import decode_kernel
from shoal.kernels.triton.attention_prefill import prefill_kernel
from shoal.kernels.triton.compile_ahead import is_compiling
from shoal.kernels.triton.dependent import launch_options
from shoal.kernels.triton.descriptors import describable, used_on

_LOG2E = 1.4426950408889634
_ROWS = 512  # rows whose lengths a program looks at together
_ROWS_LATE = 32  # the same for launches of _LATE_ROWS
_MIXED_ROWS = 4  # from here on a pass may hold enough decoding rows to be worth a launch of their own
_PADS = 8  # rows that a group of programs looks at before its work, for padding; others come after it
_FEW_PARTS = 2  # of a cut row, added up at once where it has no more
_PART_VALUES = 4096  # the same where it has more: as many parts as hold so many values, and
_MOST_PARTS = 16
_AHEAD = 64  # positions whose keys and values a program asks for before it may begin
_AHEAD_FUSED = 32
_OPENING = 48  # positions that are read in the time in which a row's first ones are waited for
_LATE_ROWS = range(2, 17)  # what follows starts after these: else it takes room and bandwidth at their beginning
_MOST_COUNTERS = 1 << 14  # programs of a launch; today's GPUs hold a third of that
_REGISTERS = 65536  # of a multiprocessor
_FEW_ROWS = 16  # rows of a pass that may each end in a tile of their own before programs take several tiles
_LATER_PROGRAMS = 2  # of a multiprocessor
# Keys and values of a pass come by descriptors where heads have this size and the pass this many query values: the host
# takes longer for them, and smaller passes end before it has the next kernel ready.
_OWN_SIZE = 128
_OWN_LEAST = 1 << 25

Config = TypeVar("Config")


@dataclass(frozen=True)
class DecodeConfig:
    """How decode_kernel is built: positions a tile, warps, pipeline stages, programs a multiprocessor holds at once."""

    tile: int
    warps: int
    stages: int
    programs: int
    least: int = 256  # positions worth a program of their own

    def registers(self) -> int:
        """Of a thread, at most, for all programs to be there at once: one that comes late would double the time."""
        return min(255, _REGISTERS // (self.programs * self.warps * 32) // 8 * 8)

    def shared_bytes(self, queries: int, head_pad: int, itemsize: int) -> int:
        """Shared memory of a program, at most: tiles of keys and values on their way, queries, weights, and some."""
        values = max(1, self.stages - 1) * 2 * self.tile * head_pad + queries * (head_pad + self.tile)
        return values * itemsize + 2048


@dataclass(frozen=True)
class PrefillConfig:
    """How prefill_kernel is built: query tokens times heads, positions a tile, warps, pipeline stages."""

    block_m: int
    tile: int
    warps: int
    stages: int


class Newest(NamedTuple):
    """How decode_kernel makes queries and keys out of the projection: weights of the heads' norms, angles, epsilon."""

    query_weight: torch.Tensor | None
    key_weight: torch.Tensor | None
    cos_sin: torch.Tensor
    eps: float


# (bytes of an element, largest padded head size, config); the first row that fits is used. In decode_kernel query heads
# beyond 16 a KV head count as a larger head.
DECODE_RULES = (
    (2, 64, DecodeConfig(tile=16, warps=1, stages=3, programs=8)),
    (2, 128, DecodeConfig(tile=32, warps=2, stages=3, programs=4)),
    (2, 256, DecodeConfig(tile=32, warps=4, stages=3, programs=2)),
    (2, 1024, DecodeConfig(tile=16, warps=4, stages=2, programs=1)),
    (4, 128, DecodeConfig(tile=32, warps=4, stages=1, programs=4)),
    (4, 1024, DecodeConfig(tile=16, warps=4, stages=1, programs=1)),
)
# Where it makes queries and keys too: programs that take little shared memory find room beside those of the product
# before them, so that more of them are there when it ends.
FUSED_RULES = (
    (2, 64, DecodeConfig(tile=16, warps=1, stages=3, programs=8, least=128)),
    (2, 128, DecodeConfig(tile=16, warps=2, stages=3, programs=4, least=128)),
    *DECODE_RULES[2:],
)
PREFILL_RULES = (
    (2, 64, PrefillConfig(block_m=128, tile=64, warps=4, stages=3)),
    (2, 128, PrefillConfig(block_m=128, tile=64, warps=8, stages=3)),
    (2, 256, PrefillConfig(block_m=64, tile=32, warps=4, stages=2)),
    (2, 1024, PrefillConfig(block_m=32, tile=16, warps=4, stages=2)),
    (4, 128, PrefillConfig(block_m=32, tile=32, warps=4, stages=1)),
    (4, 1024, PrefillConfig(block_m=16, tile=16, warps=4, stages=1)),
)
# The same for rows whose keys and values come by descriptors: (most query tokens of a row, config).
OWN_RULES = (
    (2047, PrefillConfig(block_m=64, tile=32, warps=4, stages=3)),
    (1 << 31, PrefillConfig(block_m=128, tile=128, warps=8, stages=3)),
)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """See kernels/ops/paged_attention.py. Grids depend on shapes and on the two bounds only: graphs may record it.

    Launches of one device must follow each other: decoding rows that are cut meet in one set of counters.
    """
    if query.stride(-1) != 1:
        query = query.contiguous()
    num_tokens, num_heads, head_dim = query.shape
    num_rows = seq_lens.shape[0]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return out
    tensors = (query, key_cache, value_cache, cu_seqlens_q, seq_lens, block_tables, out)
    own = (key, value) if key is not None and value is not None and suits_own(query, key, value) else None
    large = own is not None and query.numel() >= _OWN_LEAST
    apart = large or max_query_len == 1 or num_rows >= _MIXED_ROWS
    if apart:
        every_row_decodes = max_query_len == 1 and num_tokens == num_rows
        decode(*tensors, scale * _LOG2E, max_seq_len, mixed=not every_row_decodes)
    if max_query_len > 1 and not large:
        prefill(*tensors, scale * _LOG2E, "many" if apart else "all")
    if max_query_len > 1 and own is not None and (large or is_compiling()):
        for config in _own_configs(max_query_len):
            prefill(*tensors, scale * _LOG2E, "fresh", own, config)
        prefill(*tensors, scale * _LOG2E, "later")
    return out


def suits_own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a pass's own keys and values may come by descriptors."""
    return query.shape[2] == _OWN_SIZE and used_on(query.device) and describable(key) and describable(value)


def _own_configs(max_query_len: int) -> list[PrefillConfig]:
    """The one for rows of so many query tokens; all of them where kernels are only compiled."""
    if is_compiling():
        return [config for _, config in OWN_RULES]
    return [next(config for most, config in OWN_RULES if max_query_len <= most)]


def decode_attention(
    qkv: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    max_seq_len: int,
    num_heads: int,
) -> torch.Tensor:
    """See kernels/ops/decode_attention.py; may be recorded, and must follow others, as paged_attention."""
    assert qkv.stride(1) == 1
    head_dim = key_cache.shape[3]
    query = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if len(query):
        tensors = (query, key_cache, value_cache, seq_lens, seq_lens, block_tables, out)  # no row starts are needed
        newest = Newest(query_weight, key_weight, cos_sin, eps)
        decode(*tensors, scale * _LOG2E, max_seq_len, mixed=False, newest=newest)
    return out


def decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    scale_log2: float,
    max_seq_len: int,
    mixed: bool,
    config: DecodeConfig | None = None,
    newest: Newest | None = None,
) -> None:
    """The rows of one query token, into `out`; where not `mixed`, that is every row. With `newest`, `query` is the
    beginning of each row of the merged projection, and the rest of it follows there."""
    num_heads, head_dim = query.shape[1:]
    _, block_size, kv_heads, _ = key_cache.shape
    num_rows, group = seq_lens.shape[0], num_heads // kv_heads
    head_pad = max(16, triton.next_power_of_2(head_dim))
    heads_pad = triton.next_power_of_2(group)
    group_pad = max(16, heads_pad)
    rules = DECODE_RULES if newest is None else FUSED_RULES
    config = config or rule(rules, query.dtype, head_pad * group_pad // 16)
    least = max(1, config.least // config.tile)
    shared = config.shared_bytes(group_pad, head_pad, query.element_size())
    groups = _programs(query.device, config.programs, shared) // kv_heads
    groups = max(1, min(groups, num_rows * -(-max_seq_len // (config.tile * least))))
    arrived = _counters(query.device)
    late = newest is not None and num_rows in _LATE_ROWS
    assert groups * kv_heads <= arrived.numel()
    partial = torch.empty((groups, 2, num_heads, head_dim), dtype=torch.float32, device=query.device)
    lse = torch.empty((groups, 2, num_heads), dtype=torch.float32, device=query.device)
    decode_kernel[(groups * kv_heads,)](
        query,
        key_cache,
        value_cache,
        cu_seqlens_q,
        seq_lens,
        block_tables,
        out,
        partial,
        lse,
        arrived,
        *((None, None, None, 0.0) if newest is None else newest),
        scale_log2,
        num_rows,
        least,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        GROUP=group,
        GROUP_PAD=group_pad,
        HEAD=head_dim,
        HEAD_PAD=head_pad,
        TILE=config.tile,
        OPENING=max(1, _OPENING // config.tile),
        KV_HEADS=kv_heads,
        ROWS=_ROWS_LATE if late else _ROWS,
        HEADS=heads_pad,
        FEW=_FEW_PARTS,
        MANY=max(_FEW_PARTS, min(_MOST_PARTS, _PART_VALUES // (heads_pad * head_pad))),
        PADS=_PADS,
        AHEAD=_AHEAD if newest is None else _AHEAD_FUSED,
        LATE=late,
        MIXED=mixed,
        FUSED=newest is not None,
        PRECISION="ieee",
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers(),
        **launch_options(query.device),
    )


def prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    scale_log2: float,
    which: str,
    own: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: PrefillConfig | None = None,
) -> None:
    """The rows that prefill_kernel knows by this word, into `out`; `own`: their keys and values, for "fresh" ones."""
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    num_rows, group = seq_lens.shape[0], num_heads // kv_heads
    head_pad = max(16, triton.next_power_of_2(head_dim))
    config = config or rule(PREFILL_RULES, query.dtype, head_pad)
    block_m = max(config.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    block = [config.tile, 1, head_dim]
    descriptors = (None, None) if own is None else [TensorDescriptor.from_tensor(x, block) for x in own]
    # Enough programs for a tile each where rows are long; many short rows take turns.
    tiles = num_tokens // block_q + min(num_rows, _FEW_ROWS)
    if which == "later":  # often none, or few
        tiles = min(tiles, max(1, _programs(query.device, _LATER_PROGRAMS, 1) // kv_heads))
    prefill_kernel[(tiles * kv_heads,)](
        query,
        key_cache,
        value_cache,
        *descriptors,
        cu_seqlens_q,
        seq_lens,
        block_tables,
        out,
        scale_log2,
        num_rows,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        GROUP=group,
        HEAD=head_dim,
        HEAD_PAD=head_pad,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        TILE=config.tile,
        KV_HEADS=kv_heads,
        ROWS=_ROWS,
        WHICH=which,
        PRECISION="ieee",
        num_warps=config.warps,
        num_stages=config.stages,
    )


def rule(rules: Sequence[tuple[int, int, Config]], dtype: torch.dtype, head_pad: int) -> Config:
    """The config of the first row of a table that fits."""
    for itemsize, largest, config in rules:
        if dtype.itemsize == itemsize and head_pad <= largest:
            return config
    raise ValueError(f"no attention kernel for {dtype} with head_dim {head_pad} (padded); the largest is {largest}")


@functools.cache
def _programs(device: torch.device, wanted: int, shared_bytes: int) -> int:
    """Programs that a GPU holds at once; in Triton's interpreter a few, so that rows are cut there too."""
    if device.type != "cuda":
        return 8 * wanted
    card = torch.cuda.get_device_properties(device)
    return card.multi_processor_count * max(1, min(wanted, card.shared_memory_per_multiprocessor // shared_bytes))


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """Zeros between launches. They outlive every graph that holds their address."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "run once before recording"
    return torch.zeros(_MOST_COUNTERS, dtype=torch.int32, device=device)
