"""embed: rows of an embedding table, or of one rank's part of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op


def _embed(ids: torch.Tensor, weight: torch.Tensor, first_id: int) -> torch.Tensor:
    """Rows ids - first_id of weight [rows, size]; zeros for ids (int64 [n]) that lie outside. [n, size]."""
    places = ids - first_id
    foreign = (places < 0) | (places >= weight.shape[0])
    return weight[places.masked_fill(foreign, 0)].masked_fill(foreign.unsqueeze(1), 0.0)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for tokens, rows, size, first in ((1, 3, 8, 0), (7, 20, 1030, 0), (9, 20, 48, 15), (0, 4, 16, 0)):
        ids = torch.randint(0, first + rows + (5 if first else 0), (tokens,), generator=generator)
        yield ids.to(device), torch.randn(rows, size, generator=generator).to(device), first


embed = Op(_embed, cases=_cases, implementations={"triton": "shoal.kernels.triton.embed:embed"}, tolerance=0)
