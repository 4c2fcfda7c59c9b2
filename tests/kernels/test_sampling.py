"""The sampling ops against plain definitions over the whole vocabulary."""

import numpy as np
import pytest
import torch

from shoal.kernels.ops import sampling
from shoal.kernels.ops.philox import gumbel_noise
from shoal.kernels.ops.sampling import greedy, sample, sample_filtered, top_candidates

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noisy(rows, vocab_size, spread=3.0, seed=0):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def drawn_by_definition(logits, temperature, log_min_p, top_k, top_p, streams, positions):
    """One row after another: stable order, explicit sets, noise of the whole vocabulary."""
    ids = []
    for i in range(len(logits)):
        scores = logits[i : i + 1].float() / temperature[i]
        scores[scores < scores.max() + log_min_p[i]] = -torch.inf
        order = torch.sort(scores[0], descending=True, stable=True).indices
        order = order[: int(top_k[i])]
        weights = (scores[0, order] - scores.max()).exp().double()
        before = weights.cumsum(0) - weights
        if top_p[i] < 1:
            order = order[before < top_p[i] * weights.sum()]
        kept = torch.full_like(scores, -torch.inf)
        kept[0, order] = scores[0, order]
        ids.append(int((kept + gumbel_noise(streams[i : i + 1], positions[i : i + 1], logits.shape[1])).argmax()))
    return ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [3, 512, 513, 1024, 3000])
def test_greedy_is_argmax_lowest_id_first(dtype, vocab_size):
    logits = noisy(9, vocab_size).to(dtype)
    logits[1] = 0  # all equal
    logits[2, [vocab_size - 1, vocab_size // 2]] = 99  # two equal ones
    logits[3, -1] = 99
    logits[4] = -torch.inf
    expected = [int(np.argmax(row)) for row in logits.float().numpy()]
    assert greedy(logits).tolist() == expected
    assert greedy(logits[:, : vocab_size - 1]).tolist() == [int(np.argmax(r)) for r in logits[:, :-1].float().numpy()]


def test_top_candidates_orders_by_value_then_id():
    logits = torch.tensor([[1.0, -0.0, 3.0, 0.0, 3.0, -torch.inf, -2.0], [-5.0, -5.0, -4.0, 7.0, 7.0, 7.0, 0.0]])
    for k in (1, 2, 3, 5, 7):
        values, ids = top_candidates(logits, k)
        assert ids.tolist() == [[2, 4, 0, 1, 3, 6, 5][:k], [3, 4, 5, 6, 2, 0, 1][:k]]
        assert torch.equal(values, logits.gather(1, ids))


@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_filtered_equals_the_definition_over_the_whole_vocabulary(chunk, monkeypatch):
    monkeypatch.setattr(sampling, "_CPU_CHUNK", chunk)
    rows, vocab_size = 48, 2500
    row = torch.arange(rows)
    # Wide spreads end in a few candidates, flat ones need every growth of the candidate list.
    logits = noisy(rows, vocab_size) * torch.tensor([0.01, 0.5, 1.0, 3.0])[row % 4].unsqueeze(1)
    logits[5::7] = logits[5::7].round()  # many ties
    temperature = 0.5 + 0.1 * (row % 11)
    log_min_p = torch.where(row % 5 == 0, -4.0, -torch.inf)
    top_p = torch.tensor([1.0, 0.9, 0.5, 0.999, 0.01], dtype=torch.float64)[row % 5]
    top_k = torch.tensor([vocab_size, 1, 40, 300, 2000, vocab_size])[row % 6]
    streams, positions = row * 0x1234567 - 20, row % 3
    arguments = (logits, temperature, log_min_p, top_k, top_p, streams, positions)
    expected = drawn_by_definition(*arguments)
    assert sample_filtered(*arguments).tolist() == expected
    small = (top_k <= 300).nonzero().squeeze(1)
    picked = [argument[small] for argument in arguments]
    assert sample_filtered(*picked, 300).tolist() == [expected[i] for i in small.tolist()]
    assert sample_filtered(*picked, 1 << 20).tolist() == [expected[i] for i in small.tolist()]


def test_top_p_is_of_the_mass_that_a_large_top_k_leaves():
    """The nucleus is within the first candidates, but how large it is only the 1500 best can say."""
    row = torch.arange(40)
    top_k, top_p = torch.full((40,), 1500), torch.full((40,), 0.05, dtype=torch.float64)
    logits, off = noisy(40, 2500, spread=0.01), torch.full((40,), -torch.inf)
    arguments = (logits, torch.ones(40), off, top_k, top_p, row, row)
    assert sample_filtered(*arguments).tolist() == drawn_by_definition(*arguments)


def test_sample_equals_the_definition_in_any_chunking(monkeypatch):
    row = torch.arange(20)
    logits = noisy(20, 1001).to(torch.bfloat16)
    log_min_p = torch.where(row % 2 == 0, -1.0, -torch.inf)
    off = (torch.full((20,), 1001), torch.ones(20, dtype=torch.float64))
    expected = drawn_by_definition(logits, 0.5 + row / 10, log_min_p, *off, row * 99, row)
    for chunk in (1, 3003, 1 << 20):
        monkeypatch.setattr(sampling, "_CPU_CHUNK", chunk)
        assert sample(logits, 0.5 + row / 10, log_min_p, row * 99, row).tolist() == expected


def test_nan_logits_still_give_an_id():
    logits = noisy(2, 700)
    logits[0] = torch.nan
    logits[1, ::2] = -torch.tensor(torch.nan)
    one, none = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    for top_k in (5, 700):
        ids = sample_filtered(logits, one, None, none + top_k, torch.full((2,), 0.5, dtype=torch.float64), none, none)
        assert ((ids >= 0) & (ids < 700)).all()
    assert (sample(logits, one, None, none, none) < 700).all()


@pytest.mark.parametrize("op", [greedy, sample, sample_filtered])
def test_cases_run_and_repeat(op):
    for first, second in zip(op.cases(), op.cases(), strict=True):
        ids = op(*first)
        assert ids.dtype == torch.int64
        assert ids.shape == first[0].shape[:1]
        assert torch.equal(ids, op(*second))
