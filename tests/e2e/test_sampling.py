"""Sampling through the whole engine: what a seed promises, and that each parameter does something."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from shoal import SamplingParams

SEEDED = SamplingParams(temperature=0.9, seed=42, max_tokens=24, ignore_eos=True)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(rng.randrange(2, 40))] for _ in range(count)]


def ids(outputs) -> list[list[int]]:
    return [list(part.token_ids) for output in outputs for part in output.outputs]


@pytest.mark.usefixtures("overcommit")
def test_a_seeded_row_is_the_same_alone_in_a_batch_and_after_preemption(tiny_checkpoint, local_llm) -> None:
    folder = tiny_checkpoint("llama")
    batch = prompts(64)
    llm = local_llm(folder)
    alone = ids(llm.generate([batch[17]], SEEDED, use_tqdm=False))[0]
    together = ids(llm.generate(batch, SEEDED, use_tqdm=False))
    assert together[17] == alone
    assert len({tuple(line) for line in together}) == 64
    tight = local_llm(folder, num_gpu_blocks_override=9, enable_prefix_caching=False)
    assert ids(tight.generate(batch[10:20], SEEDED, use_tqdm=False))[7] == alone
    assert tight.llm_engine.scheduler.stats.num_preemptions >= 1


def test_seeds_and_samples_differ(tiny_checkpoint, local_llm) -> None:
    llm = local_llm(tiny_checkpoint("llama"))
    (prompt,) = prompts(1)
    four = ids(llm.generate([prompt], replace(SEEDED, n=4), use_tqdm=False))
    assert len({tuple(line) for line in four}) == 4
    others = [ids(llm.generate([prompt], replace(SEEDED, seed=42 + i), use_tqdm=False))[0] for i in range(4)]
    assert others == four  # sample i of a seeded row has seed + i


def test_unseeded_equal_prompts_are_independent_and_follow_the_engine_seed(tiny_checkpoint, local_llm) -> None:
    folder, params = tiny_checkpoint("llama"), replace(SEEDED, seed=None)
    same = [prompts(1)[0]] * 6
    first = ids(local_llm(folder, seed=1).generate(same, params, use_tqdm=False))
    assert len({tuple(line) for line in first}) == 6
    assert ids(local_llm(folder, seed=1).generate(same, params, use_tqdm=False)) == first
    assert ids(local_llm(folder, seed=2).generate(same, params, use_tqdm=False)) != first


CHANGES = {
    "temperature": {"temperature": 0.3},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.1},
    "min_p": {"min_p": 0.5},
    "seed": {"seed": 43},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "presence_penalty": {"presence_penalty": 2.0},
    "logit_bias": {"logit_bias": {9: 8.0}},
    "allowed_token_ids": {"allowed_token_ids": [5, 6, 7, 8]},
    "max_tokens": {"max_tokens": 5},
    "stop_token_ids": {"stop_token_ids": list(range(3, 200))},
    "stop": {"stop": ["e", "a", "o", " "]},
    "ignore_eos": {"ignore_eos": False, "logit_bias": {2: 5.0}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_parameter_changes_something(name, tiny_checkpoint, local_llm) -> None:
    llm = local_llm(tiny_checkpoint("llama"))
    batch = prompts(8)
    base = ids(llm.generate(batch, replace(SEEDED, max_tokens=48), use_tqdm=False))
    changed = ids(llm.generate(batch, replace(SEEDED, **({"max_tokens": 48} | CHANGES[name])), use_tqdm=False))
    assert base != changed
    if name == "allowed_token_ids":
        assert {t for line in changed for t in line} <= {5, 6, 7, 8}
    if name == "max_tokens":
        assert {len(line) for line in changed} == {5}


def test_bad_words_and_min_tokens(tiny_checkpoint, local_llm) -> None:
    llm = local_llm(tiny_checkpoint("llama"))
    eager = replace(SEEDED, ignore_eos=False, logit_bias={2: 9.0})
    assert {len(line) for line in ids(llm.generate(prompts(6), eager, use_tqdm=False))} != {24}
    late = ids(llm.generate(prompts(6), replace(eager, min_tokens=13), use_tqdm=False))
    assert all(len(line) >= 13 for line in late)
    free = llm.generate(prompts(6), replace(SEEDED, max_tokens=60), use_tqdm=False)
    assert any("e" in o.outputs[0].text for o in free)
    held = llm.generate(prompts(6), replace(SEEDED, max_tokens=60, bad_words=["e"]), use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    banned = set(tokenizer.encode("e") + tokenizer.encode(" e"))
    assert not any(banned & set(line) for line in ids(held) if len(banned) == 1)


def test_custom_logits_processor_sees_every_token(tiny_checkpoint, local_llm) -> None:
    llm = local_llm(tiny_checkpoint("llama"), logits_processors=[CountUp])
    assert llm.resolved.decode_burst == 1
    assert llm.resolved.lookahead == 0
    counting = replace(SEEDED, extra_args={"count_from": 100}, max_tokens=6)
    plain, counted = llm.generate(prompts(2), [replace(SEEDED, max_tokens=6), counting], use_tqdm=False)
    assert list(counted.outputs[0].token_ids) == [100, 101, 102, 103, 104, 105]
    assert (
        list(plain.outputs[0].token_ids)
        == ids(local_llm(tiny_checkpoint("llama")).generate(prompts(1), SEEDED, use_tqdm=False))[0][:6]
    )


class CountUp:
    """Forces ids that count up, for requests with extra_args["count_from"]."""

    def __init__(self, vocab_size, device) -> None:
        self.vocab_size = vocab_size

    def for_request(self, extra_args):
        if "count_from" not in extra_args:
            return None

        def process(prompt_ids, output_ids, logits):
            logits.fill_(float("-inf"))
            logits[extra_args["count_from"] + len(output_ids)] = 0.0
            return logits

        return process
