"""sum_add_norm in Triton: one program a row, read from every rank's memory and written to every rank's memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.rms_norm import num_warps


@triton.jit
def _place(own_ptr, addresses_ptr, rank, stride, REMOTE: tl.constexpr):
    """Where that rank's rows begin."""
    if REMOTE:
        return tl.multiple_of(tl.load(addresses_ptr + rank).to(own_ptr.dtype), 16)
    else:
        return own_ptr + rank * stride


@triton.jit
def _meet(words_ptr, slot, rank, WORLD: tl.constexpr):
    """What this program did on any rank before is done for all of them, once all are here. Words end as they began, 0.

    A program waits for its namesakes only: they are started in the same order everywhere, so none waits for good.
    """
    tl.debug_barrier()  # of all threads of this program
    for step in tl.static_range(1, WORLD):
        peer = (rank + step) % WORLD
        word = tl.load(words_ptr + peer).to(tl.pointer_type(tl.int32)) + slot * WORLD + rank
        while tl.atomic_cas(word, 0, 1, sem="release", scope="sys") != 0:
            pass
    for step in tl.static_range(1, WORLD):
        peer = (rank + step) % WORLD
        word = tl.load(words_ptr + rank).to(tl.pointer_type(tl.int32)) + slot * WORLD + peer
        while tl.atomic_cas(word, 1, 0, sem="acquire", scope="sys") != 1:
            pass
    tl.debug_barrier()


@triton.jit
def sum_add_norm_kernel(
    parts_ptr, sums_ptr, residual_ptr, weight_ptr, own_ptr, addresses_ptr, words_ptr, eps, first, count, stride, rank,
    WORLD: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REMOTE: tl.constexpr,
    MEET: tl.constexpr,
):  # fmt: skip
    """Row first + program id; a rank's rows are `stride` elements after the last rank's, or at its address."""
    index = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    if MEET:
        _meet(words_ptr, index, rank, WORLD)
        mask = mask & (index < count)
    row = (first + index) * SIZE + offs
    dtype = parts_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + index * SIZE + offs, mask=mask, other=0.0)
    for peer in tl.static_range(WORLD):
        part = tl.load(_place(parts_ptr, addresses_ptr, peer, stride, REMOTE) + row, mask=mask, other=0.0)
        total += part.to(tl.float32)
    if own_ptr is not None:
        total += tl.load(own_ptr + index * SIZE + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += residual.to(tl.float32)
    out = total.to(dtype)
    if residual_ptr is not None:
        tl.store(residual_ptr + index * SIZE + offs, out, mask=mask)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=offs < SIZE, other=0.0)
        wide = out.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
        out = ((wide * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)
    for peer in tl.static_range(PLACES):
        tl.store(_place(sums_ptr, addresses_ptr + WORLD, peer, stride, REMOTE) + row, out, mask=mask)
    if MEET:
        _meet(words_ptr, tl.num_programs(0) + index, rank, WORLD)


def sum_add_norm(
    parts: torch.Tensor,
    sums: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    first: int,
    count: int,
    addresses: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
    meeting: tuple[int, int, torch.Tensor] | None = None,
) -> None:
    """See kernels/ops/sum_add_norm.py."""
    assert parts.is_contiguous()
    assert sums.is_contiguous()
    assert residual is None or residual.is_contiguous()
    assert own is None or own.is_contiguous()
    world, rows, size = parts.shape
    rank, programs, words = (0, count, None) if meeting is None else meeting
    if not programs:
        return
    sum_add_norm_kernel[(programs,)](
        parts,
        sums,
        residual,
        weight,
        own,
        parts if addresses is None else addresses,  # not read
        parts if words is None else words,
        eps,
        first,
        count,
        rows * size,
        rank,
        WORLD=world if addresses is None else addresses.shape[1],
        PLACES=sums.shape[0] if addresses is None else addresses.shape[1],
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        REMOTE=addresses is not None,
        MEET=words is not None,
        num_warps=num_warps(size),
    )
