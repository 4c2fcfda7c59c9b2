"""top_ids: the most likely ids of each row, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op
from shoal.kernels.ops.sampling import top_candidates


def _top_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The ids of the k highest logits of each row, best first, lower ids first among equals: int64 [n, k].

    logits [n, vocab], any float dtype; k from 1 to vocab.
    """
    return top_candidates(logits.to(torch.float32), k)[1]


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, vocab, k in ((1, 3, 3), (4, 5003, 20), (2, 700, 290), (0, 9, 2)):
        logits = (torch.randn(rows, vocab, generator=generator) * 2).to(device)
        logits[1:2] = logits[1:2].round()  # equals: the lowest first
        yield logits, k


top_ids = Op(
    _top_ids, cases=_cases, implementations={"triton": "shoal.kernels.triton.top_ids:top_ids"}, tolerance=0
)  # fmt: skip
