"""rms_norm in Triton: one program a row, everything in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps, x_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
    dtype = x.dtype
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + offs, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * SIZE + offs, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    normed = (wide * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * SIZE + offs, normed.to(dtype), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels/ops/rms_norm.py."""
    size = x.shape[-1]
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    rows = x.numel() // size
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(out)
    if rows:
        rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            out,
            summed,
            eps,
            x.stride(0) if x.dim() == 2 else size,
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
            ADD=residual is not None,
            num_warps=4 if size <= 2048 else 8,
        )
    return out, summed
