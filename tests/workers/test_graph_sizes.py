"""Which batch sizes decode steps are recorded for."""

from itertools import pairwise

import pytest

pytest.importorskip("triton")
from shoal.workers.decode_graphs import graph_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 16, 100, 256, 257, 1024, 2048, 5000])
def test_every_batch_has_a_size_and_little_padding(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert all(
        larger <= 2 * smaller and larger - smaller <= max(32, larger // 4)
        for smaller, larger in pairwise(sizes)
        if smaller <= 4096
    )
    assert len(sizes) <= 50
