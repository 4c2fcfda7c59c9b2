"""Logprobs of sampled tokens and of prompts."""

import numpy as np
import pytest
import torch

from shoal.workers import logprobs as module
from shoal.workers.plan import RowSampling
from shoal.workers.sampler import Sampler, SamplingState

VOCAB = 700


class Batch:
    def __init__(self, rows):
        self.token_ids = torch.zeros(rows, 8, dtype=torch.int32)
        self.num_prompt_tokens = torch.full((rows,), 2, dtype=torch.int32)
        self.num_tokens = torch.full((rows,), 2, dtype=torch.int32)


def make(samplings):
    state = SamplingState(len(samplings), VOCAB, torch.device("cpu"))
    for row, sampling in enumerate(samplings):
        state.add(row, sampling, np.array([1, 2], np.int32), 2)
    return Sampler(state, Batch(len(samplings)))


def random_logits(rows, dtype=torch.float32):
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 3).to(dtype)


def check_entry(entry, t, logits, token_id, k):
    exact = logits.double().log_softmax(-1).numpy()
    assert entry.ids.dtype == np.int32
    assert entry.logprobs.dtype == np.float32
    assert entry.ids[t, 0] == token_id
    assert entry.ranks[t] == (exact >= exact[token_id]).sum()
    best = np.argsort(-exact, kind="stable")[:k]  # lowest id first among equals
    assert entry.ids[t, 1 : k + 1].tolist() == best.tolist()
    np.testing.assert_allclose(entry.logprobs[t, : k + 1], exact[[token_id, *best]], atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_mixed_counts_in_one_batch(dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", chunk)
    wanted = [3, None, 0, -1, 5, None, 5000, 1]
    sampler = make([RowSampling(stream=i, num_logprobs=k, temperature=float(i % 3)) for i, k in enumerate(wanted)])
    logits = random_logits(len(wanted), dtype)
    out = sampler(logits, torch.arange(len(wanted)), list(range(len(wanted))))
    host = out.logprobs.to_host()
    assert sorted(host) == [i for i, k in enumerate(wanted) if k is not None]
    for i, entry in host.items():
        k = VOCAB if wanted[i] == -1 else min(wanted[i], VOCAB)
        assert entry.ids.shape == entry.logprobs.shape == (1, k + 1)
        check_entry(entry, 0, logits[i], int(out.token_ids[i]), k)
    for request, entries in out.logprobs.parts:  # unused columns of the tensors
        for row, count in enumerate(request.counts):
            assert (entries.ids[row, count + 1 :] == -1).all()
            assert (entries.ids[row, : count + 1] >= 0).all()


def test_places_are_those_of_the_call_not_of_the_persistent_batch():
    sampler = make([RowSampling(temperature=0.0, num_logprobs=2 if i == 4 else None) for i in range(6)])
    logits = random_logits(2)
    out = sampler(logits, torch.tensor([1, 4]), [1, 4])
    assert list(out.logprobs.to_host()) == [1]
    check_entry(out.logprobs.to_host()[1], 0, logits[1], int(logits[1].argmax()), 2)
    assert sampler(logits, torch.tensor([1, 2]), [1, 2]).logprobs is None


def test_they_are_of_the_unprocessed_logits():
    processed = {"logit_bias": ((9, 100.0),), "temperature": 0.3, "repetition_penalty": 1.5, "top_k": 4}
    sampler = make([RowSampling(num_logprobs=4, bad_words=((5,),), **processed)])
    logits = random_logits(1)
    out = sampler(logits, torch.tensor([0]), [0])
    assert out.token_ids.tolist() == [9]
    check_entry(out.logprobs.to_host()[0], 0, logits[0], 9, 4)


def test_equal_logits_rank_together_and_order_by_id():
    sampler = make([RowSampling(temperature=0.0, num_logprobs=4)])
    logits = torch.zeros(1, VOCAB)
    logits[0, [600, 30, 31]] = 2.0
    entry = sampler(logits, torch.tensor([0]), [0]).logprobs.to_host()[0]
    assert entry.ids.tolist() == [[30, 30, 31, 600, 0]]
    assert entry.ranks.tolist() == [3]


@pytest.mark.parametrize("k", [0, 3, -1])
def test_prompt_logprobs(k, monkeypatch):
    sampler = make([RowSampling()])
    logits = random_logits(11, torch.float16)
    targets = torch.arange(0, 11 * 60, 60)
    whole = sampler.prompt_logprobs(logits, targets, k)
    monkeypatch.setattr(module, "_CPU_CHUNK", 2 * VOCAB)
    chunked = sampler.prompt_logprobs(logits, targets, k)
    for t in range(11):
        check_entry(whole, t, logits[t], int(targets[t]), VOCAB if k == -1 else k)
    for a, b in ((whole.ids, chunked.ids), (whole.logprobs, chunked.logprobs), (whole.ranks, chunked.ranks)):
        assert np.array_equal(a, b)
