"""embed in Triton: one program a token and part of its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.dependent import launch_options, wait_for_previous

_BLOCK = 1024


@triton.jit
def embed_kernel(
    ids_ptr, weight_ptr, out_ptr, first_id, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """ids [n], weight [num_rows, SIZE] -> out [n, SIZE]."""
    wait_for_previous(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token) - first_id
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    there = mask & (row >= 0) & (row < num_rows)
    tl.store(out_ptr + token * SIZE + offs, tl.load(weight_ptr + row * SIZE + offs, mask=there, other=0.0), mask=mask)


def embed(ids: torch.Tensor, weight: torch.Tensor, first_id: int) -> torch.Tensor:
    """See kernels/ops/embed.py."""
    num_rows, size = weight.shape
    assert weight.is_contiguous()
    assert ids.is_contiguous()
    out = torch.empty((len(ids), size), dtype=weight.dtype, device=weight.device)
    if len(ids):
        embed_kernel[(len(ids), triton.cdiv(size, _BLOCK))](
            ids,
            weight,
            out,
            first_id,
            num_rows,
            SIZE=size,
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(weight.device),
        )
    return out
