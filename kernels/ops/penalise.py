"""penalise: repetition, frequency and presence penalties of some rows of a batch's logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op

_CPU_CHUNK = 1 << 17  # logits changed at once: temporaries stay in the cache
_DEVICE_CHUNK = 1 << 24


def _penalise(
    logits: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, slots: torch.Tensor, penalties: torch.Tensor
) -> None:
    """Change rows of logits (float32 [n, vocab]) in place.

    rows int64 [m], all different; counts int32 [any, vocab], each entry 2 * (times generated) + (1 if the prompt has
    it), slots int64 [m] its lines; penalties float32 [3, m]: repetition, frequency, presence. Repetition divides
    positive logits, and multiplies negative ones, of tokens in prompt or output; frequency is subtracted once for each
    time a token was generated, presence once if it was generated at all.
    """
    step = max(1, (_CPU_CHUNK if logits.device.type == "cpu" else _DEVICE_CHUNK) // logits.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        repetition, frequency, presence = penalties[:, part].unsqueeze(-1)
        count, changed = counts[slots[part]], logits[rows[part]]
        repeated = torch.where(changed > 0, changed / repetition, changed * repetition)
        changed = torch.where(count > 0, repeated, changed)
        generated = count >> 1
        changed -= frequency * generated
        changed -= presence * (generated > 0)
        logits[rows[part]] = changed


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for vocab, rows in ((7, [0]), (5003, [4, 0, 1])):
        logits = torch.randn(5, vocab, generator=generator).to(device) * 4
        logits[0, ::3] = -torch.inf
        counts = torch.randint(0, 5, (4, vocab), generator=generator, dtype=torch.int32).to(device)
        slots = torch.tensor([3, 1, 2], device=device)[: len(rows)]
        penalties = torch.tensor([[1.3, 0.7, 1.0], [0.4, -0.3, 0.0], [0.5, 0.0, -1.1]], device=device)[:, : len(rows)]
        yield logits, torch.tensor(rows, device=device), counts, slots, penalties


penalise = Op(
    _penalise, cases=_cases, implementations={"triton": "shoal.kernels.triton.penalise:penalise"}, tolerance=0
)
