"""top_ids in Triton: the k best by selection.py, and only those put in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.selection import CAPACITY, Selection, is_ahead, kth, load_scores, select

_INF = tl.constexpr(float("inf"))
NO_KEY = tl.constexpr(-9223372036854775808)


@triton.jit
def _store_keys(
    base, ids_ptr, length, temperature, floor, k, vocab, keys_ptr, count_ptr, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """Integers that order as the k best ids do, in no order; count_ptr points to 0."""
    value, bound = kth(base, ids_ptr, length, temperature, floor, k, vocab, ROW, BLOCK)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < length
        scores, ids = load_scores(base, ids_ptr, offs, mask, temperature, floor, ROW)
        hits = mask & is_ahead(scores, ids, value, bound)
        slots = tl.atomic_add(count_ptr + offs * 0, 1, mask=hits, sem="relaxed")
        bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 and 0.0 are equal
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        tl.store(keys_ptr + slots, (ordered << 32) + (vocab - 1 - ids), mask=hits)


# vocab as a constant 1 makes Triton 3.6 fail to compile it for a GPU.
@triton.jit(do_not_specialize=["vocab"])
def top_keys_kernel(
    logits_ptr, temperature_ptr, floor_ptr, bound_ptr, count_ptr, scores_ptr, ids_ptr, keys_ptr, stored_ptr,
    vocab, logits_stride, k, CAPACITY: tl.constexpr, SMALL: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """One program a row: -> keys [n, k]."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * logits_stride
    count = tl.load(count_ptr + row)
    floor = tl.load(floor_ptr + row)
    temperature = 1.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    keys = keys_ptr + row * k
    if (tl.load(bound_ptr + row) > -_INF) & (count <= CAPACITY):
        scores, ids = scores_ptr + row * CAPACITY, ids_ptr + row * CAPACITY
        _store_keys(scores, ids, count, temperature, floor, k, vocab, keys, stored_ptr + row, False, SMALL)
    else:
        _store_keys(base, base, vocab, temperature, floor, k, vocab, keys, stored_ptr + row, True, LARGE)


def ordered_keys(found: Selection, logits: torch.Tensor, temperature: torch.Tensor | None, k: int) -> torch.Tensor:
    """Integers of the k best ids of each row, best first: int64 [n, k]; NO_KEY where floors leave fewer."""
    rows, vocab = logits.shape
    keys = torch.full((rows, k), NO_KEY.value, dtype=torch.int64, device=logits.device)
    top_keys_kernel[(rows,)](
        logits,
        temperature,
        found.floor,
        found.bound,
        found.count,
        found.scores,
        found.ids,
        keys,
        torch.zeros(rows, dtype=torch.int32, device=logits.device),
        vocab,
        logits.stride(0),
        k,
        CAPACITY=CAPACITY,
        SMALL=1024,
        LARGE=4096,
        num_warps=8,
    )
    return keys.sort(dim=-1, descending=True).values


def top_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    """See kernels/ops/top_ids.py."""
    rows, vocab = logits.shape
    if not rows or 2 * k > vocab:  # most of the vocabulary: then ordering all of it is the shortest way
        return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    keys = ordered_keys(select(logits, None, None, k), logits, None, k)
    return vocab - 1 - (keys & 0xFFFFFFFF)
