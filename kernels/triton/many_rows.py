"""Matrix products of many rows in Triton: what follows the product is done before the result leaves the chip.

A step of prompts is bound by arithmetic and, on an H100, by the power that it takes: there a product alone is as fast
as the library's, and what is saved is a pass over memory after it, for activation and multiplication after a gated
layer's two projections. Tiles come and go by tensor descriptors; a program for each multiprocessor takes tile after
tile, so that one tile's end overlaps the next one's start. Results equal the library's and the separate kernel's to the
last bit where that adds up in the same order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from shoal.kernels.triton.activation import KINDS, activate
from shoal.kernels.triton.descriptors import describable, used_on


@dataclass(frozen=True)
class ManyRowsConfig:
    """Tile of rows, of the weights' rows, and of inputs; row tiles that share weights; warps; pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int


CONFIG = ManyRowsConfig(128, 256, 64, 8, 8, 3)
# Where it is faster than the library and a kernel after it (docs/performance.md): fewer rows leave multiprocessors
# without a tile at the end, small products end before the host has the next one ready. Rows; rows x outputs x inputs.
_LEAST_ROWS = 1024
_LEAST_WORK = 3 << 33


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, 2 * BLOCK_N] -> the left and the right half. Threads hold columns of both: nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))


@triton.jit(do_not_specialize=["num_rows"])
def many_rows_kernel(
    x_desc, weight_desc, out_desc, num_rows, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [num_rows, K], weight [2, N, K], gate first -> act(gate) * up [num_rows, N]."""
    WIDTH: tl.constexpr = BLOCK_N // 2
    dtype: tl.constexpr = out_desc.dtype
    num_m = tl.cdiv(num_rows, BLOCK_M)
    num_n = tl.cdiv(N, WIDTH)
    per_group = GROUP * num_n
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=True):
        first_m = tile // per_group * GROUP
        group = tl.minimum(num_m - first_m, GROUP)
        row = (first_m + tile % per_group % group) * BLOCK_M
        column = tile % per_group // group * WIDTH
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            weight = weight_desc.load([0, column, k]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(x_desc.load([row, k]), weight.T, acc)
        gate, up = _halves(acc, BLOCK_M, WIDTH)
        # Rounded where the product, the activation and their product are as ops of their own.
        gate = activate(gate.to(dtype).to(tl.float32), KIND).to(dtype)
        out_desc.store([row, column], gate * up.to(dtype))


@functools.cache
def _programs(device: torch.device) -> int:
    """One for each multiprocessor; in Triton's interpreter a few, so that each takes several tiles."""
    return 3 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def suits_many(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `many_rows` should be used."""
    if x.dim() != 2 or x.shape[0] < _LEAST_ROWS or x.shape[0] * weight.numel() < _LEAST_WORK or not used_on(x.device):
        return False
    outputs = weight.shape[0] // 2
    return describable(x) and describable(weight) and outputs * weight.itemsize % 16 == 0 and weight.is_contiguous()


def many_rows(x: torch.Tensor, weight: torch.Tensor, name: str, config: ManyRowsConfig | None = None) -> torch.Tensor:
    """act(gate) * up, [num_rows, N], of weights [2 * N, K], gate rows first."""
    (num_rows, size), outputs = x.shape, weight.shape[0] // 2
    config = config or CONFIG
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    out = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device)
    many_rows_kernel[(_programs(x.device),)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight.view(2, outputs, size), [2, block_n // 2, block_k]),
        TensorDescriptor.from_tensor(out, [block_m, block_n // 2]),
        num_rows,
        N=outputs,
        K=size,
        KIND=KINDS[name],
        GROUP=config.group,
        PROGRAMS=_programs(x.device),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
