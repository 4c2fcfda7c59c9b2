"""sample_rows: greedy and random rows of one batch in one op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op
from shoal.kernels.ops.philox import gumbel_noise


def _sample_rows(
    logits: torch.Tensor, temperature: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The likeliest id where temperature is 0, else a draw from softmax(logits / temperature); int64 [n].

    logits [n, vocab], any float dtype; temperature float32 [n]; streams, positions int64 [n] (see philox.py). Among
    equals the lowest id wins.
    """
    scores = logits.float()
    random = (temperature > 0).unsqueeze(1)
    noise = gumbel_noise(streams, positions, logits.shape[1])
    scores = torch.where(random, scores / torch.where(random, temperature.unsqueeze(1), 1.0) + noise, scores)
    return scores.argmax(dim=-1)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, vocab in ((1, 5), (3, 1030), (6, 4100)):
        logits = (torch.randn(rows, vocab, generator=generator) * 3).to(device)
        logits[0, 1::2] = logits[0].amax()  # equals: the lowest wins
        row = torch.arange(rows, device=device)
        yield logits, (row % 3) * 0.7, row * 0x1E3779B97F4A7C15, row * 5


sample_rows = Op(
    _sample_rows, cases=_cases, implementations={"triton": "shoal.kernels.triton.sample_rows:sample_rows"}, tolerance=0
)
