"""rms_norm in Triton: one program a row, everything in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.dependent import launch_options, wait_for_previous


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps, x_stride, part_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x [rows, SIZE], rows x_stride apart, or the sum of PARTS of these; residual, out and sum [rows, SIZE]."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)  # before the sum, whose barrier would hold it back
    wait_for_previous(DEPENDENT)
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
    dtype = out_ptr.dtype.element_ty
    if PARTS > 1:
        for part in tl.static_range(1, PARTS):
            x += tl.load(x_ptr + part * part_stride + row * x_stride + offs, mask=mask, other=0.0)
        x = x.to(dtype)
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + offs, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * SIZE + offs, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * SIZE + offs, normed.to(dtype), mask=mask)


def num_warps(size: int) -> int:
    """Warps for a row held in registers: 16 bytes of bfloat16 a thread, or two or four times that."""
    return 1 if size <= 512 else 4 if size <= 2048 else 8 if size <= 8192 else 16


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels/ops/rms_norm.py."""
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    return add_parts_norm(x, 1, weight, eps, residual)


def add_parts_norm(
    x: torch.Tensor, parts: int, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm of x, or where parts > 1 of the sum of x [parts, rows, size] in float32, rounded to weight's dtype."""
    size = x.shape[-1]
    if residual is not None:
        residual = residual.contiguous()
    out = torch.empty(x.shape if parts == 1 else x.shape[1:], dtype=weight.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(out)
    if out.numel():
        rms_norm_kernel[(out.numel() // size,)](
            x,
            residual,
            weight,
            out,
            summed,
            eps,
            x.stride(0) if x.dim() == 2 else size,
            out.numel(),
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
            ADD=residual is not None,
            PARTS=parts,
            num_warps=num_warps(size),
            **launch_options(x.device),
        )
    return out, summed
