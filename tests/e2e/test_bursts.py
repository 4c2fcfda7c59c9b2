"""Bursts and look-ahead keep the contract of one-step execution: the same outputs, whatever ends inside a burst."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from shoal import SamplingParams

WAYS = [(burst, lookahead) for burst in (1, 8) for lookahead in (0, 2)]


def prompts(count: int = 6, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(rng.randrange(3, 30))] for _ in range(count)]


def simplify(outputs) -> list:
    """RequestOutputs without times; numbers that arithmetic may round are kept apart."""
    exact, close = [], []
    for output in outputs:
        exact.append(
            (output.request_id, output.prompt, output.prompt_token_ids, output.finished, output.num_cached_tokens)
        )
        for entry in output.prompt_logprobs or []:
            exact.append(entry and [(i, p.rank, p.decoded_token) for i, p in entry.items()])
            close += [p.logprob for p in (entry or {}).values()]
        for part in output.outputs:
            exact.append((part.index, part.text, list(part.token_ids), part.finish_reason, part.stop_reason))
            for entry in part.logprobs or []:
                exact.append([(i, p.rank, p.decoded_token) for i, p in entry.items()])
                close += [p.logprob for p in entry.values()]
            if part.cumulative_logprob is not None:
                close.append(part.cumulative_logprob)
    return [exact, close]


BASE = SamplingParams(temperature=1.0, max_tokens=21, ignore_eos=True, seed=5)
CASES = {
    "greedy": replace(BASE, temperature=0.0, seed=None),
    "seeded": BASE,
    "eos": replace(BASE, ignore_eos=False, logit_bias={2: 4.0}, max_tokens=40),
    "stop-token": replace(BASE, stop_token_ids=list(range(60, 90)), max_tokens=40),
    "min-tokens": replace(BASE, ignore_eos=False, logit_bias={2: 6.0}, min_tokens=11, max_tokens=30),
    "stop-string": replace(BASE, stop=["e", "the", "!"], max_tokens=60),
    "stop-string-included": replace(
        BASE, stop=["e", "t"], include_stop_str_in_output=True, min_tokens=6, max_tokens=60
    ),
    "penalties": replace(
        BASE, repetition_penalty=1.6, frequency_penalty=0.7, presence_penalty=0.5, temperature=0.0, seed=None
    ),
    "bad-words": replace(BASE, bad_words=["e", "th", "a b", "<bos>"], temperature=0.7),
    "logprobs": replace(BASE, logprobs=3, prompt_logprobs=1, ignore_eos=False),
    "n": replace(BASE, n=4, max_tokens=9, logprobs=0),
    "top": replace(BASE, top_k=20, top_p=0.8, min_p=0.01),
}


@pytest.fixture(scope="module")
def module_llms():
    return {}


@pytest.mark.parametrize("case", CASES)
def test_same_outputs(case, tiny_checkpoint, local_llm) -> None:
    results = {}
    for burst, lookahead in WAYS:
        llm = local_llm(tiny_checkpoint("llama"), decode_burst=burst, lookahead=lookahead)
        results[burst, lookahead] = simplify(llm.generate(prompts(), CASES[case], use_tqdm=False))
    first = results[WAYS[0]]
    for way in WAYS[1:]:
        assert results[way][0] == first[0], way
        assert results[way][1] == pytest.approx(first[1], abs=1e-4), way
    _exercised(case, first)


def _exercised(case: str, result: list) -> None:
    """The case met what it is about: rows that end inside a burst for its reason."""
    ends = [e for e in result[0] if isinstance(e, tuple) and isinstance(e[0], int)]
    if case in ("eos", "min-tokens"):
        assert any(reason == "stop" and stop is None and len(ids) % 8 for _, _, ids, reason, stop in ends)
    if case == "stop-token":
        assert any(isinstance(stop, int) for *_, stop in ends)
    if case.startswith("stop-string"):
        assert any(isinstance(stop, str) and len(ids) % 8 for _, _, ids, _, stop in ends)
    if case == "stop-string-included":
        assert all(text.endswith(stop) for _, text, _, _, stop in ends if isinstance(stop, str))
    if case == "min-tokens":
        assert all(len(ids) >= 11 for _, _, ids, _, _ in ends)


@pytest.mark.usefixtures("overcommit")
@pytest.mark.parametrize("case", ["seeded", "eos", "stop-string", "penalties", "bad-words", "n"])
def test_same_outputs_under_preemption(case, tiny_checkpoint, local_llm) -> None:
    """A cache too small for the batch: rows are thrown out and come back, and nothing changes."""
    folder, params = tiny_checkpoint("llama"), replace(CASES[case], max_tokens=60)
    results = []
    for burst, lookahead, blocks in ((1, 0, None), (1, 0, 9), (8, 2, 9)):
        llm = local_llm(
            folder, decode_burst=burst, lookahead=lookahead, num_gpu_blocks_override=blocks, enable_prefix_caching=False
        )
        results.append(simplify(llm.generate(prompts(), params, use_tqdm=False)))
        if blocks and case not in ("eos", "stop-string"):
            assert llm.llm_engine.scheduler.stats.num_preemptions >= 1
    assert results[0][0] == results[1][0] == results[2][0]


def test_bursts_happen(tiny_checkpoint, local_llm) -> None:
    """Fewer plans than tokens: the equalities above compare different ways of running."""
    llm = local_llm(tiny_checkpoint("llama"), decode_burst=8, lookahead=2)
    llm.generate(prompts(), replace(BASE, max_tokens=41), use_tqdm=False)
    scheduler = llm.llm_engine.scheduler
    assert scheduler.stats.num_steps == 41
    assert scheduler._next_step == 1 + 5
