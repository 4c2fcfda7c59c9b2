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
def sum_add_norm_kernel(
    parts_ptr, sums_ptr, residual_ptr, weight_ptr, addresses_ptr, eps, first, stride,
    WORLD: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REMOTE: tl.constexpr,
):  # fmt: skip
    """Row first + program id; a rank's rows are `stride` elements after the last rank's, or at its address."""
    index = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    row = (first + index) * SIZE + offs
    dtype = parts_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + index * SIZE + offs, mask=mask, other=0.0)
    for rank in tl.static_range(WORLD):
        part = tl.load(_place(parts_ptr, addresses_ptr, rank, stride, REMOTE) + row, mask=mask, other=0.0)
        total += part.to(tl.float32)
    if residual_ptr is not None:
        total += residual.to(tl.float32)
    out = total.to(dtype)
    if residual_ptr is not None:
        tl.store(residual_ptr + index * SIZE + offs, out, mask=mask)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
        wide = out.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
        out = ((wide * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)
    for rank in tl.static_range(WORLD):
        tl.store(_place(sums_ptr, addresses_ptr + WORLD, rank, stride, REMOTE) + row, out, mask=mask)


def sum_add_norm(
    parts: torch.Tensor,
    sums: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    first: int,
    count: int,
    addresses: torch.Tensor | None = None,
) -> None:
    """See kernels/ops/sum_add_norm.py."""
    assert parts.is_contiguous()
    assert sums.is_contiguous()
    assert residual is None or residual.is_contiguous()
    if not count:
        return
    world, rows, size = parts.shape
    sum_add_norm_kernel[(count,)](
        parts,
        sums,
        residual,
        weight,
        parts if addresses is None else addresses,  # not read
        eps,
        first,
        rows * size,
        WORLD=world if addresses is None else addresses.shape[1],
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        REMOTE=addresses is not None,
        num_warps=num_warps(size),
    )
