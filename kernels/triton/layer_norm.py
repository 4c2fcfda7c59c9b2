"""layer_norm in Triton: one program a row, everything in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.rms_norm import num_warps


@triton.jit
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, eps, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x [rows, SIZE], rows x_stride apart -> out [rows, SIZE]; weight and bias [SIZE] or None."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x, 0) / SIZE, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / SIZE + eps)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See kernels/ops/layer_norm.py."""
    size = x.shape[-1]
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        layer_norm_kernel[(out.numel() // size,)](
            x,
            weight,
            bias,
            out,
            eps,
            x.stride(0) if x.dim() == 2 else size,
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
            num_warps=num_warps(size),
        )
    return out
