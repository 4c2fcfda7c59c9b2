"""sum_add_norm: an all-reduce with the residual and the norm inside, for one rank's share of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op
from shoal.kernels.ops.rms_norm import rms_norm


def _sum_add_norm(
    parts: torch.Tensor,
    sums: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    first: int,
    count: int,
    addresses: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
    meeting: tuple[int, int, torch.Tensor] | None = None,
) -> None:
    """For rows first .. first + count: s = sum of parts + residual, then sums = rms_norm of s (without weight: s).

    parts [world, rows, size] is what each rank adds; sums [places, rows, size] gets the result in each place; residual
    [count, size] becomes s; `own` [count, size] is one more part. With `addresses` (int64 [2, world], on the device;
    kernels only) the ranks' parts and sums, each [rows, size], are there, and `parts` and `sums` are this rank's own,
    [1, rows, size]. `meeting` (kernels only): this rank, the largest count of any rank, and addresses (int64 [world])
    of words, int32 [2, places for that many rows, world], zero, in which ranks tell each other within the op that parts
    are there and sums written; without it the caller sees to both.
    """
    assert addresses is None, "the reference works on one tensor"
    assert meeting is None, "the reference meets nobody"
    rows = slice(first, first + count)
    total = parts[:, rows].float().sum(0)
    if own is not None:
        total += own.float()
    if residual is not None:
        total += residual.float()
    total = total.to(parts.dtype)
    if residual is not None:
        residual.copy_(total)
    sums[:, rows] = total if weight is None else rms_norm.reference(total, weight, eps)[0]


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for world, places, rows, size, first, count, with_residual, with_weight in (
        (2, 2, 4, 16, 4, 0, True, True),
        (2, 2, 5, 33, 0, 3, True, True),
        (4, 4, 9, 64, 6, 3, True, False),
        (3, 1, 2, 8, 1, 1, False, False),
    ):
        parts = torch.randn(world, rows, size, generator=generator).to(device)
        residual, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((count, size), (size,)))
        sums = torch.full((places, rows, size), -7.0, device=device)
        residuals, weights = residual if with_residual else None, weight if with_weight else None
        yield parts, sums, residuals, weights, 1e-5, first, count, None, residual + 1 if places == 1 else None


sum_add_norm = Op(
    _sum_add_norm, cases=_cases, implementations={"triton": "shoal.kernels.triton.sum_add_norm:sum_add_norm"}
)
