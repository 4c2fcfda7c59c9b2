"""activation and activation_and_mul in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.dependent import launch_options, wait_for_previous

_BLOCK = 1024
KINDS = {
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@triton.jit
def activate(x, KIND: tl.constexpr):
    """float32 in and out."""
    if KIND == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "gelu_tanh")
        # (1 + tanh(z / 2)) / 2 = 1 - 1 / (exp(z) + 1), at infinity too
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        y = x * (1.0 - 1.0 / (tl.exp(z) + 1.0))
    return y


@triton.jit
def activation_kernel(
    x_ptr, out_ptr, x_stride, SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x [rows, SIZE], or [rows, 2 * SIZE] if GATED, rows x_stride apart -> out [rows, SIZE]."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    wait_for_previous(DEPENDENT)
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
    y = activate(x.to(tl.float32), KIND).to(x.dtype)
    if GATED:
        y *= tl.load(x_ptr + row * x_stride + SIZE + offs, mask=mask, other=0.0)
    tl.store(out_ptr + row * SIZE + offs, y, mask=mask)


def _run(x: torch.Tensor, name: str, gated: bool) -> torch.Tensor:
    if name not in KINDS:
        raise ValueError(f"unknown activation {name!r}, known: {', '.join(KINDS)}")
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    width = x.shape[-1]
    size = width // 2 if gated else width
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if out.numel():
        activation_kernel[(out.numel() // size, triton.cdiv(size, _BLOCK))](
            x,
            out,
            x.stride(0) if x.dim() == 2 else width,
            SIZE=size,
            KIND=KINDS[name],
            GATED=gated,
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(x.device),
        )
    return out


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """See kernels/ops/activation.py."""
    return _run(x, name, gated=False)


def activation_and_mul(gate_up: torch.Tensor, name: str) -> torch.Tensor:
    """See kernels/ops/activation_and_mul.py."""
    return _run(gate_up, name, gated=True)
