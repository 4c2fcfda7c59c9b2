"""The parts of a vocabulary, each judged alone, give what the whole gives."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.ops.best_of_part import best_of_part, id_of
from shoal.kernels.ops.sample_rows import sample_rows


@pytest.mark.parametrize(("vocab", "part"), [(300, 64), (300, 300), (65, 64), (10, 64)])
@pytest.mark.parametrize("scale", [3.0, 0.0])  # 0: all are equal, of both signs
def test_parts_choose_as_the_whole_does(vocab: int, part: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(50, vocab, generator=generator) * scale
    row = torch.arange(50)
    wishes = (row % 3) * 0.7, row * 0x1E3779B97F4A7C15, row * 5
    found = []
    for first in range(0, 2 * vocab, part):
        count = max(0, min(part, vocab - first))
        padded = torch.full((50, part), 1e9)  # padding may not win
        padded[:, :count] = logits[:, first : first + count]
        found.append(best_of_part(padded, *wishes, first, count))
    assert torch.equal(id_of(torch.stack(found).amax(0)), sample_rows(logits, *wishes))
