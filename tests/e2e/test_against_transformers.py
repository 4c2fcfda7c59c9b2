"""Shoal's outputs against transformers' own, and against themselves under every way of scheduling."""

from __future__ import annotations

import random

import pytest

from shoal import SamplingParams

FAMILIES = ("llama", "qwen3", "granite", "gpt2", "opt", "opt-post-norm")


def mixed_prompts(count: int = 16, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 384) for _ in range(rng.choice((1, 2, 5, 9, 17, 33, 40, 63)))] for _ in range(count)]


def reference(folder: str, prompts: list[list[int]], num_tokens: int):
    """Greedy tokens of transformers, and the log-softmax of every step, a prompt at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    results = []
    for prompt in prompts:
        ids, rows = list(prompt), []
        with torch.inference_mode():
            out = model(torch.tensor([ids]), use_cache=True)
            for _ in range(num_tokens):
                row = out.logits[0, -1].float().log_softmax(-1)
                rows.append(row)
                ids.append(int(row.argmax()))
                out = model(torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            full = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        results.append((ids[len(prompt) :], rows, full))
    return results


def greedy(num_tokens: int = 32, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_equal_transformers(family, tiny_checkpoint, local_llm) -> None:
    folder, prompts = tiny_checkpoint(family), mixed_prompts()
    llm = local_llm(folder, max_num_batched_tokens=256)
    outputs = llm.generate(prompts, greedy(logprobs=5, prompt_logprobs=2), use_tqdm=False)
    for prompt, output, (tokens, rows, full) in zip(prompts, outputs, reference(folder, prompts, 32), strict=True):
        completion = output.outputs[0]
        assert list(completion.token_ids) == tokens
        for entry, token, row in zip(completion.logprobs, tokens, rows, strict=True):
            assert next(iter(entry)) == token
            assert entry[token].rank == 1
            best = row.topk(5)
            assert set(best.indices.tolist()) == set(entry)
            for candidate, value in entry.items():
                assert value.logprob == pytest.approx(float(row[candidate]), abs=1e-4)
        assert completion.cumulative_logprob == pytest.approx(
            sum(float(r[t]) for t, r in zip(tokens, rows, strict=True)), abs=1e-3
        )
        assert output.prompt_logprobs[0] is None
        for position in range(1, len(prompt)):
            entry = output.prompt_logprobs[position]
            row = full[position - 1]
            assert entry[prompt[position]].logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
            assert entry[prompt[position]].rank == int((row >= row[prompt[position]]).sum())
            assert {int(i) for i in row.topk(2).indices} <= set(entry)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_num_batched_tokens": 8, "max_num_seqs": 8, "enable_prefix_caching": False},
        {"decode_burst": 1, "lookahead": 0},
        {"decode_burst": 8, "lookahead": 2},
        {"block_size": 1},
        {"block_size": 64},
        {"max_num_seqs": 3},
        {"long_prefill_token_threshold": 5},
    ],
    ids=str,
)
def test_scheduling_does_not_change_tokens(arguments, tiny_checkpoint, local_llm) -> None:
    folder, prompts = tiny_checkpoint("llama"), mixed_prompts()
    expected = [tokens for tokens, _, _ in reference(folder, prompts, 32)]
    outputs = local_llm(folder, **arguments).generate(prompts, greedy(), use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected


@pytest.mark.usefixtures("overcommit")
def test_preemption_does_not_change_tokens(tiny_checkpoint, local_llm) -> None:
    folder, prompts = tiny_checkpoint("llama"), mixed_prompts()
    expected = [tokens for tokens, _, _ in reference(folder, prompts, 32)]
    longest = max(map(len, prompts)) + 32
    llm = local_llm(folder, num_gpu_blocks_override=-(-longest * 3 // 2 // 16), enable_prefix_caching=False)
    outputs = llm.generate(prompts, greedy(), use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    assert counts["shoal:num_preemptions"] >= 1


def test_prefix_hits_do_not_change_tokens(tiny_checkpoint, local_llm) -> None:
    folder = tiny_checkpoint("llama")
    common = mixed_prompts(1, seed=9)[0] * 3 + [7] * 40
    prompts = [[*common, i + 5, 9] for i in range(6)]
    expected = [tokens for tokens, _, _ in reference(folder, prompts, 12)]
    llm = local_llm(folder, max_num_seqs=2)
    for _ in range(2):
        outputs = llm.generate(prompts, greedy(12), use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    assert all(o.num_cached_tokens == len(p) // 16 * 16 for o, p in zip(outputs, prompts, strict=True))
    assert llm.reset_prefix_cache()
    assert llm.generate(prompts[:1], greedy(1), use_tqdm=False)[0].num_cached_tokens == 0
