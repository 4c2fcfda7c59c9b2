"""20,000 draws of each kind against the exact distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from shoal.workers.plan import RowSampling
from shoal.workers.sampler import Sampler, SamplingState

VOCAB, ROWS, POSITIONS = 50, 2000, 10
PROMPT, OUTPUT = [3, 4, 4, 10], [5, 5, 6, 10]
LOGITS = np.random.default_rng(0).normal(0, 1.5, VOCAB).astype(np.float32)


class Batch:
    def __init__(self, tokens):
        self.token_ids = torch.tensor(tokens, dtype=torch.int32).expand(ROWS, -1)
        self.num_prompt_tokens = torch.full((ROWS,), len(PROMPT), dtype=torch.int32)
        self.num_tokens = torch.full((ROWS,), len(tokens), dtype=torch.int32)


def exact(s):
    """The distribution, from the definitions, in float64."""
    x = LOGITS.astype(np.float64)
    counts = np.bincount(OUTPUT, minlength=VOCAB)
    seen = (counts + np.bincount(PROMPT, minlength=VOCAB)) > 0
    x = np.where(seen, np.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty), x)
    x = x - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)
    p = np.exp(x / s.temperature)
    p[p < s.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if s.top_k:
        p[order[s.top_k :]] = 0
    p /= p.sum()
    if s.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= s.top_p]] = 0
    return p / p.sum()


def draw(sampling_of_row):
    """[POSITIONS, ROWS] tokens: each row a stream, each step another output position of the same history."""
    batch = Batch(PROMPT + OUTPUT)
    state = SamplingState(ROWS, VOCAB, torch.device("cpu"))
    for row in range(ROWS):
        state.add(row, sampling_of_row(row), np.array(PROMPT + OUTPUT, np.int32), len(PROMPT))
    sampler, rows = Sampler(state, batch), torch.arange(ROWS)
    host_rows, logits = rows.tolist(), torch.from_numpy(LOGITS).expand(ROWS, -1)
    steps = []
    for _ in range(POSITIONS):
        steps.append(sampler(logits, rows, host_rows).token_ids)
        batch.num_tokens += 1
    return torch.stack(steps).numpy()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.8},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.07},
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 0.9},
        {"presence_penalty": -1.2},
        {"temperature": 1.3, "min_p": 0.02, "top_k": 20, "top_p": 0.9, "frequency_penalty": -0.5},
    ],
    ids=str,
)
def test_draws_have_the_exact_distribution(parameters):
    drawn = draw(lambda row: RowSampling(stream=row * 7 + 1, **parameters))
    observed = np.bincount(drawn.ravel(), minlength=VOCAB)
    expected = exact(RowSampling(**parameters)) * ROWS * POSITIONS
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    observed_bins = np.append(observed[common], observed[~common].sum())
    expected_bins = np.append(expected[common], expected[~common].sum())
    if expected_bins[-1] < 5:  # too few for a bin of their own
        observed_bins = np.append(observed_bins[:-2], observed_bins[-2:].sum())
        expected_bins = np.append(expected_bins[:-2], expected_bins[-2:].sum())
    assert stats.chisquare(observed_bins, expected_bins).pvalue > 1e-3
    if parameters:  # and the test would have seen the parameter ignored
        plain = exact(RowSampling()) * ROWS * POSITIONS
        assert stats.chisquare(observed, plain).pvalue < 1e-6


@pytest.mark.parametrize("parameters", [{}, {"top_k": 30, "top_p": 0.95}], ids=str)
def test_neighbouring_streams_and_positions_are_independent(parameters):
    drawn = draw(lambda row: RowSampling(stream=row, **parameters))
    groups = np.searchsorted(np.cumsum(exact(RowSampling(**parameters))), [0.25, 0.5, 0.75])
    classes = np.digitize(drawn, groups)
    for first, second in ((classes[:, :-1], classes[:, 1:]), (classes[:-1], classes[1:])):
        table = np.zeros((4, 4))
        np.add.at(table, (first.ravel(), second.ravel()), 1)
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        assert table.shape[0] >= 3
        assert stats.chi2_contingency(table).pvalue > 1e-3
