"""silu_and_mul in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def silu_and_mul_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + offs, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + offs, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * SIZE + offs, silu * up, mask=mask)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See kernels/ops/silu_and_mul.py."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (out.numel() // size, triton.cdiv(size, _BLOCK))
        silu_and_mul_kernel[grid](gate_up, out, SIZE=size, BLOCK=_BLOCK, num_warps=4)
    return out
