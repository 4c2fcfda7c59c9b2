"""logprobs_of: log-probabilities of given tokens, and how likely the first of them is among all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op


def _logprobs_of(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-softmax of each row at ids, float32 [n, k]; rank of column 0 of ids, int32 [n]).

    logits [n, vocab], any float dtype; ids int64 [n, k], k at least 1. The rank is the number of logits that are at
    least the token's own: 1 for the likeliest. Logits are compared rather than logprobs, whose rounding makes equals of
    different logits.
    """
    wide = logits.float()
    ranks = (wide >= wide.gather(1, ids[:, :1])).sum(dim=-1, dtype=torch.int32)
    return wide.log_softmax(dim=-1).gather(1, ids), ranks


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, vocab, width in ((1, 3, 1), (4, 4103, 5), (0, 9, 2)):
        logits = (torch.randn(rows, vocab, generator=generator) * 5).to(device)
        logits[:, 1] = -torch.inf
        yield logits, torch.randint(0, vocab, (rows, width), generator=generator).to(device)


logprobs_of = Op(_logprobs_of, cases=_cases, implementations={"triton": "shoal.kernels.triton.logprobs_of:logprobs_of"})
