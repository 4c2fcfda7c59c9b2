"""best_of_part: what one rank's share of the vocabulary has to offer each row, as one number that ranks can compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op
from shoal.kernels.ops.philox import gumbel_noise

_IDS = 0xFFFFFFFF


def _best_of_part(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    first_id: int,
    num_ids: int,
) -> torch.Tensor:
    """The best of ids first_id .. first_id + num_ids for each row, as sample_rows judges them; int64 [n].

    logits [n, at least num_ids], of these ids; first_id is a multiple of 4; the rest as in sample_rows. Of results for
    several parts of one vocabulary the largest is the best, of the lowest id among equals; `id_of` gives its id. A part
    without ids gives the least number.
    """
    if num_ids <= 0:
        return torch.full(logits.shape[:1], torch.iinfo(torch.int64).min, device=logits.device)
    scores = logits[:, :num_ids].float()
    random = (temperature > 0).unsqueeze(1)
    noise = gumbel_noise(streams, positions, first_id + num_ids)[:, first_id:]
    scores = torch.where(random, scores / torch.where(random, temperature.unsqueeze(1), 1.0) + noise, scores)
    index = scores.argmax(dim=-1, keepdim=True)
    return pack(scores.gather(1, index), index + first_id).squeeze(1)


def pack(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 scores and int64 ids as int64: ordered by score, and of equal scores the lower id is larger."""
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(torch.int64) << 32) | (_IDS - ids)


def id_of(packed: torch.Tensor) -> torch.Tensor:
    """The id in each result of best_of_part."""
    return _IDS - (packed & _IDS)


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, width, first, count in ((2, 8, 16, 0), (1, 8, 4, 5), (3, 1030, 1032, 1030), (6, 4100, 0, 4099)):
        logits = (torch.randn(rows, width, generator=generator) * 3).to(device)
        logits[0, 1::2] = logits[0].amax()  # equals: the lowest wins
        row = torch.arange(rows, device=device)
        yield logits, (row % 3) * 0.7, row * 0x1E3779B97F4A7C15, row * 5, first, count


best_of_part = Op(
    _best_of_part,
    cases=_cases,
    implementations={"triton": "shoal.kernels.triton.best_of_part:best_of_part"},
    tolerance=0,
)
