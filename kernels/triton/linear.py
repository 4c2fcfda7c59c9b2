"""Matrix products of few rows in Triton: the weights are read once, and asked for before the rows are there.

A decode step multiplies some hundred rows at most, which takes a GPU less time than to launch, fill and drain a kernel.
So these kernels are launched early (see dependent.py) and prefetch their part of the weights while the kernel before
them still runs. Where a layer has few outputs, its inputs are split over more programs (`parts`); whoever reads the
result adds the float32 parts up, which the normalization after each row-parallel layer does in passing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional

from shoal.kernels.triton.activation import KINDS, activate, activation_and_mul
from shoal.kernels.triton.dependent import launch_options, prefetch, wait_for_previous
from shoal.kernels.triton.many_rows import many_rows, suits_many
from shoal.kernels.triton.rms_norm import add_parts_norm, rms_norm

Rules = Sequence[tuple[int, "LinearConfig"]]
LINE = tl.constexpr(64)  # 16-bit values of a cache line


@dataclass(frozen=True)
class LinearConfig:
    """Tile of rows, outputs and inputs; parts the inputs are split into; warps; pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    parts: int
    warps: int
    stages: int


# (most rows, config): the first row that fits is used, none: the library's product. Tiles as measured on an H100 in the
# chain of a decode step (docs/performance.md). Larger weights take the library as long as reading them does.
MOST_WEIGHTS = 8 << 20
_LEAST_ADDED = 1024  # rows from which on the library adds the residual; below, the norm does while it waits for memory
_MOST_MASKED = 64  # rows
_MOST_PADDED = 128  # more rows only where they fill their tiles, but for products that are split
LINEAR_RULES: Rules = (
    (16, LinearConfig(16, 32, 128, 1, 4, 6)),
    (64, LinearConfig(64, 32, 128, 1, 4, 6)),
    (128, LinearConfig(128, 32, 64, 1, 4, 6)),
    (256, LinearConfig(128, 64, 64, 1, 4, 6)),
)
GATED_RULES: Rules = (
    (16, LinearConfig(16, 32, 128, 1, 4, 6)),
    (64, LinearConfig(64, 32, 128, 1, 4, 6)),
    (128, LinearConfig(128, 32, 64, 1, 4, 6)),
)
SPLIT_RULES: Rules = (
    (16, LinearConfig(16, 32, 128, 4, 4, 6)),
    (64, LinearConfig(64, 32, 128, 4, 4, 6)),
    (128, LinearConfig(64, 64, 128, 4, 4, 4)),
    (256, LinearConfig(64, 64, 128, 2, 4, 4)),
)


@triton.jit
def _prefetch_weights(
    weight_ptr, first_n, first_k, N: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    rows = first_n + tl.arange(0, BLOCK_N)
    at = first_k + tl.arange(0, LINES) * LINE
    at = tl.minimum(rows, N - 1).to(tl.int64)[:, None] * K + tl.minimum(at, K - 1)[None, :]
    prefetch(weight_ptr + at, DEPENDENT)


@triton.jit
def _load(pointers, k, K: tl.constexpr, EVEN: tl.constexpr):
    """Where K is made of whole tiles nothing is masked; k has the shape of what lies along K."""
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=k < K, other=0.0)
    return tile


@triton.jit
def _load_rows(pointers, there, k, K: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """Where they are FULL all rows are read; rows that are not there are masked otherwise."""
    if FULL:
        tile = _load(pointers, k, K, EVEN)
    elif EVEN:
        tile = tl.load(pointers, mask=there, other=0.0)
    else:
        tile = tl.load(pointers, mask=there & (k < K), other=0.0)
    return tile


@triton.jit
def _rows_at(x_ptr, rows, num_rows, x_stride, FULL: tl.constexpr):
    """Where rows begin, [rows, 1]. Rows beyond the end are masked, or the first ones once more where they are FULL:
    all in one row's place would be asked for many times over, which costs more than the product."""
    if FULL:
        rows = rows % num_rows
    return x_ptr + rows.to(tl.int64)[:, None] * x_stride


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, x_stride, N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
    PARTS: tl.constexpr, LINES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FULL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x [num_rows, K], weight [N, K] -> out [num_rows, N], or float32 parts [PARTS, num_rows, N]."""
    first_n = tl.program_id(0) * BLOCK_N
    first_k = tl.program_id(2) * SPAN
    if tl.program_id(1) == 0:
        _prefetch_weights(weight_ptr, first_n, first_k, N, K, LINES, BLOCK_N, DEPENDENT)
    wait_for_previous(DEPENDENT)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = first_n + tl.arange(0, BLOCK_N)
    offs = first_k + tl.arange(0, BLOCK_K)
    # Outputs beyond the end compute what the last one does, and store nothing.
    x_at = _rows_at(x_ptr, rows, num_rows, x_stride, FULL) + offs[None, :]
    there = (rows < num_rows)[:, None]
    w_at = weight_ptr + tl.minimum(outs, N - 1).to(tl.int64)[None, :] * K + offs[:, None]
    EVEN: tl.constexpr = SPAN * PARTS == K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, SPAN, BLOCK_K):
        x = _load_rows(x_at + k, there, (offs + k)[None, :], K, EVEN, FULL)
        w = _load(w_at + k, (offs + k)[:, None], K, EVEN)
        acc = tl.dot(x, w, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outs, mask=outs < N, other=0.0).to(tl.float32)[None, :]
    part = tl.program_id(2).to(tl.int64) * num_rows if PARTS > 1 else tl.cast(0, tl.int64)
    at = (part + rows.to(tl.int64))[:, None] * N + outs[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & (outs < N)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def gated_linear_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, x_stride, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    LINES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FULL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x [num_rows, K], weight [2 * N, K], gate rows first -> act(gate) * up [num_rows, N]."""
    first_n = tl.program_id(0) * BLOCK_N
    if tl.program_id(1) == 0:
        _prefetch_weights(weight_ptr, first_n, 0, N, K, LINES, BLOCK_N, DEPENDENT)
        _prefetch_weights(weight_ptr + N * K, first_n, 0, N, K, LINES, BLOCK_N, DEPENDENT)
    wait_for_previous(DEPENDENT)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = first_n + tl.arange(0, BLOCK_N)
    offs = tl.arange(0, BLOCK_K)
    x_at = _rows_at(x_ptr, rows, num_rows, x_stride, FULL) + offs[None, :]
    there = (rows < num_rows)[:, None]
    w_at = weight_ptr + tl.minimum(outs, N - 1).to(tl.int64)[None, :] * K + offs[:, None]
    EVEN: tl.constexpr = K % BLOCK_K == 0
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x = _load_rows(x_at + k, there, (offs + k)[None, :], K, EVEN, FULL)
        gate = tl.dot(x, _load(w_at + k, (offs + k)[:, None], K, EVEN), gate)
        up = tl.dot(x, _load(w_at + N * K + k, (offs + k)[:, None], K, EVEN), up)
    dtype = out_ptr.dtype.element_ty
    # Rounded where the product, the activation and their product are as ops of their own.
    y = activate(gate.to(dtype).to(tl.float32), KIND).to(dtype) * up.to(dtype)
    at = rows.to(tl.int64)[:, None] * N + outs[None, :]
    tl.store(out_ptr + at, y, mask=(rows < num_rows)[:, None] & (outs < N)[None, :])


def rule(rules: Rules, x: torch.Tensor, weight: torch.Tensor, most_padded: int = _MOST_PADDED) -> LinearConfig | None:
    """The config of the first row of a table that fits this product; None where the library is faster, or exact."""
    if x.dtype.itemsize != 2 or x.dim() != 2 or x.stride(1) != 1 or not x.shape[0] or weight.numel() > MOST_WEIGHTS:
        return None
    config = next((config for rows, config in rules if x.shape[0] <= rows), None)
    padded = config is not None and x.shape[0] > most_padded and x.shape[0] % config.block_m
    return None if padded else config


def _reads_full_tiles(num_rows: int, config: LinearConfig) -> bool:
    """Whether a mask, which slows a tile down, is worth less than what it saves: reading rows for nothing."""
    return num_rows % config.block_m == 0 or num_rows > _MOST_MASKED


def _lines(span: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(span, LINE.value)))


def linear_parts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: LinearConfig
) -> torch.Tensor:
    """[num_rows, N] in x's dtype, or float32 [parts, num_rows, N] whose sum it is where the config splits."""
    (num_rows, size), outputs = x.shape, weight.shape[0]
    parts = config.parts
    assert weight.is_contiguous()
    assert bias is None or parts == 1
    span = triton.cdiv(triton.cdiv(size, parts), config.block_k) * config.block_k
    shape = (num_rows, outputs) if parts == 1 else (parts, num_rows, outputs)
    out = torch.empty(shape, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    linear_kernel[(triton.cdiv(outputs, config.block_n), triton.cdiv(num_rows, config.block_m), parts)](
        x,
        weight,
        bias,
        out,
        num_rows,
        x.stride(0),
        N=outputs,
        K=size,
        SPAN=span,
        PARTS=parts,
        LINES=_lines(span),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        FULL=_reads_full_tiles(num_rows, config),
        num_warps=config.warps,
        num_stages=config.stages,
        **launch_options(x.device),
    )
    return out


def gated(x: torch.Tensor, weight: torch.Tensor, name: str, config: LinearConfig) -> torch.Tensor:
    """act(gate) * up, [num_rows, N], of weights [2 * N, K]."""
    (num_rows, size), outputs = x.shape, weight.shape[0] // 2
    assert weight.is_contiguous()
    assert config.parts == 1
    out = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device)
    gated_linear_kernel[(triton.cdiv(outputs, config.block_n), triton.cdiv(num_rows, config.block_m))](
        x,
        weight,
        out,
        num_rows,
        x.stride(0),
        N=outputs,
        K=size,
        KIND=KINDS[name],
        LINES=_lines(size),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        FULL=_reads_full_tiles(num_rows, config),
        num_warps=config.warps,
        num_stages=config.stages,
        **launch_options(x.device),
    )
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See kernels/ops/linear.py."""
    config = rule(LINEAR_RULES, x, weight)
    if config is None:
        return functional.linear(x, weight, bias)
    return linear_parts(x, weight, bias, config)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    """See kernels/ops/gated_linear.py."""
    config = rule(GATED_RULES, x, weight)
    if config is None and suits_many(x, weight):
        return many_rows(x, weight, name)
    if config is None:
        return activation_and_mul(functional.linear(x, weight), name)
    return gated(x, weight, name, config)


def linear_add_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels/ops/linear_add_norm.py."""
    config = rule(SPLIT_RULES, x, weight, most_padded=SPLIT_RULES[-1][0])
    if config is None and x.shape[0] >= _LEAST_ADDED and x.dtype.itemsize == 2:  # float32 rounds as the reference does
        return rms_norm(residual.addmm_(x, weight.t()), norm_weight, eps)
    if config is None:
        return rms_norm(functional.linear(x, weight), norm_weight, eps, residual)
    return add_parts_norm(linear_parts(x, weight, None, config), config.parts, norm_weight, eps, residual)
