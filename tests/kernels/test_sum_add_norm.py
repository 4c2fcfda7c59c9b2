"""What no test without GPUs can run of sum_add_norm: ranks that meet inside the kernel. What it compiles to."""

from __future__ import annotations

import os
import re

import pytest
import torch


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_meet_by_system_wide_atomics(world_size, compiled_for_hopper) -> None:
    from shoal.kernels.triton.sum_add_norm import sum_add_norm

    parts, sums, residual = (torch.zeros(1, 64, 4096, dtype=torch.bfloat16) for _ in range(3))
    addresses = torch.zeros(2, world_size, dtype=torch.int64)
    meeting = (1, 32, torch.zeros(world_size, dtype=torch.int64))
    arguments = (parts, sums, residual[0, :32], parts[0, 0], 1e-5, 32, 32, addresses, None, meeting)
    (kernel,) = compiled_for_hopper(sum_add_norm, *arguments)
    ptx = kernel.asm["ptx"]
    others = 2 * (world_size - 1)  # before the sum and after it
    assert len(re.findall(r"atom\.global\.release\.sys\S*\.cas", ptx)) == others
    assert len(re.findall(r"atom\.global\.acquire\.sys\S*\.cas", ptx)) == others
    wide = re.findall(r"(?:ld|st)\.global\.v4\.b32", ptx)
    assert len(wide) == 2 * (world_size + 3 + world_size), "rows are not read and written 16 bytes at a time"
