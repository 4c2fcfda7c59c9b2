"""Matrix products of many rows in Triton: what follows the product is done before the result leaves the chip.

A step of prompts is bound by arithmetic and, on an H100, by the power that it takes: there a product alone is as fast
as the library's, and what is saved is a pass over memory after it: activation and multiplication after a gated layer's
two projections, the residual's addition after a layer that ends a block. Tiles come and go by tensor descriptors (TMA);
a program for each multiprocessor takes tile after tile, so that one tile's end overlaps the next one's start.
Results equal the library's and the separate kernels' to the last bit where that adds up in the same order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from shoal.kernels.triton.activation import KINDS, activate


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
# without a tile at the end, small products end before the host has the next one ready, and a residual that is waited
# for after few inputs costs what its pass over memory would. Rows, and rows x outputs x inputs.
_LEAST_ROWS = 1024
_LEAST_GATED = 3 << 33
_LEAST_ADDED, _LEAST_INPUTS = 3 << 36, 4096
_ALIGNED = 8  # 16-bit values: descriptors want 16 bytes


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, 2 * BLOCK_N] -> the left and the right half. Threads hold columns of both: nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))


@triton.jit
def _add(acc, residual, dtype: tl.constexpr):
    """Rounded as the product and the sum are as ops of their own."""
    return acc.to(dtype).to(tl.float32) + residual.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def many_rows_kernel(
    x_desc, weight_desc, residual_desc, out_desc, num_rows, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [num_rows, K], weight [2, N, K], gate first -> act(gate) * up [num_rows, N]; or, without KIND, weight [N, K]
    -> the product, residual [num_rows, N] added where there is one. Blocks of out and residual are half as wide as the
    product's."""
    HALF: tl.constexpr = BLOCK_N // 2
    dtype: tl.constexpr = out_desc.dtype
    WIDTH: tl.constexpr = BLOCK_N if KIND is None else HALF
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
            x = x_desc.load([row, k])
            if KIND is None:
                weight = weight_desc.load([column, k])
            else:
                weight = weight_desc.load([0, column, k]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(x, weight.T, acc)
        left, right = _halves(acc, BLOCK_M, HALF)
        if KIND is None:
            if residual_desc is not None:
                left = _add(left, residual_desc.load([row, column]), dtype)
                right = _add(right, residual_desc.load([row, column + HALF]), dtype)
            out_desc.store([row, column], left.to(dtype))
            out_desc.store([row, column + HALF], right.to(dtype))
        else:
            # Rounded where the product, the activation and their product are as ops of their own.
            gate = activate(left.to(dtype).to(tl.float32), KIND).to(dtype)
            out_desc.store([row, column], gate * right.to(dtype))


@functools.cache
def _programs(device: torch.device) -> int:
    """One for each multiprocessor; in Triton's interpreter a few, so that each takes several tiles."""
    return 3 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _suits(device: torch.device) -> bool:
    """Tiles were chosen on Hopper; other generations have other matrix instructions."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def suits_gated(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `many_rows` should be used for a gated layer."""
    return _work(x, weight) >= _LEAST_GATED and weight.shape[0] // 2 % _ALIGNED == 0


def suits_added(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether `many_rows` should be used for a layer whose output is added to a residual."""
    enough = _work(x, weight) >= _LEAST_ADDED and x.shape[1] >= _LEAST_INPUTS
    return enough and weight.shape[0] % _ALIGNED == 0 and residual.is_contiguous() and residual.data_ptr() % 16 == 0


def _work(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Multiplications and additions; 0 for what the kernel does not take."""
    if x.dtype.itemsize != 2 or x.dim() != 2 or x.shape[0] < _LEAST_ROWS or not _suits(x.device):
        return 0
    aligned = x.stride(0) % _ALIGNED == 0 and x.shape[1] % _ALIGNED == 0
    starts = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return x.shape[0] * weight.numel() if aligned and starts and x.stride(1) == 1 and weight.is_contiguous() else 0


def many_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    name: str | None = None,
    residual: torch.Tensor | None = None,
    config: ManyRowsConfig | None = None,
) -> torch.Tensor:
    """x @ weight.T, residual added where given; with a name, act(gate) * up of weights [2 * N, K], gate rows first."""
    (num_rows, size), outputs = x.shape, weight.shape[0]
    config = config or CONFIG
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    block, weights = [block_n, block_k], weight
    if name is not None:
        assert residual is None
        outputs //= 2
        block, weights = [2, block_n // 2, block_k], weight.view(2, outputs, size)
    out = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device)
    tile = [block_m, block_n // 2]
    many_rows_kernel[(_programs(x.device),)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weights, block),
        None if residual is None else TensorDescriptor.from_tensor(residual, tile),
        TensorDescriptor.from_tensor(out, tile),
        num_rows,
        N=outputs,
        K=size,
        KIND=None if name is None else KINDS[name],
        GROUP=config.group,
        PROGRAMS=_programs(x.device),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
