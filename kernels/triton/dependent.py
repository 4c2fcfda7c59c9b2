"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits where it must.

On Hopper and later, kernels that are launched with `launch_options` may begin before their predecessor has ended. Each
of them therefore calls `wait_for_previous` in every program, before it reads what the predecessor wrote and before it
writes anything; that also lets the next kernel start, unless the two are called apart (`wait_only`, and later
`let_next_start`). So a kernel that runs knows that everything but its direct predecessor is complete: before the wait
it may read parameters of the model and what two launches before it, or earlier ones, have written.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Everything launched earlier on this stream is complete and visible when this returns; then the next may start."""
    wait_only(DEPENDENT)
    let_next_start(DEPENDENT)


@triton.jit
def wait_only(DEPENDENT: tl.constexpr):
    """The first half of `wait_for_previous`: the next kernel starts when all programs have called `let_next_start`."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """After `wait_only`."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers, DEPENDENT: tl.constexpr):
    """Asks for the cache lines at these addresses, without waiting for them."""
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@functools.cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """What a launch of a kernel with a DEPENDENT parameter is given on that device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
