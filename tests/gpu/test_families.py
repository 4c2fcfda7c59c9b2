"""Tiny checkpoints of every family on a GPU, against the same engine on the CPU by the torch references of the ops."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from shoal import SamplingParams
from shoal.workers.models.registry import MODELS

# name -> (family of tests/conftest.py, changes of its config)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-gelu-bias": ("llama", {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen3": ("qwen3", {}),
    "granite": ("granite", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "opt-post-norm": ("opt-post-norm", {}),
}
WAYS = {
    "eager": {"enforce_eager": True, "decode_burst": 1, "lookahead": 0},
    "eager-bursts": {"enforce_eager": True, "decode_burst": 16, "lookahead": 1},
    "graphs": {"decode_burst": 1, "lookahead": 1},
    "graphs-bursts": {"decode_burst": 16, "lookahead": 1},
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NUM_TOKENS = 24
ROWS = 12
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.9, "seed": 7}
# What sampling parameters can ask for; each row of the mixed batch takes the next.
WISHES: list[dict[str, Any]] = [
    GREEDY | {"logprobs": 3, "prompt_logprobs": 1},
    SEEDED | {"top_p": 0.8},
    SEEDED | {"top_k": 5},
    SEEDED | {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "logprobs": 0},
    SEEDED | {"min_p": 0.1},
    GREEDY | {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    SEEDED | {"repetition_penalty": 0.8, "top_p": 0.5},
    SEEDED | {"ignore_eos": False, "stop_token_ids": list(range(40, 160)), "min_tokens": 6},
    SEEDED | {"logit_bias": {9: 3.0, 11: -100.0}, "logprobs": 2},
    SEEDED | {"allowed_token_ids": list(range(20, 90))},
    GREEDY | {"bad_words": ["e", "th"]},
    SEEDED,
]


def prompts() -> list[list[int]]:
    rng = random.Random(4)
    return [[rng.randrange(3, 250) for _ in range(rng.choice((1, 3, 8, 17, 33, 70)))] for _ in range(ROWS)]


def batches() -> dict[str, list[SamplingParams]]:
    """plain: rows whose steps are wholly in a graph; mixed: every wish, side by side."""
    common = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    plain = [GREEDY if i % 3 == 0 else SEEDED | {"seed": i} for i in range(ROWS)]
    for i in (4, 7, 10):
        plain[i] |= {"stop_token_ids": list(range(3, 384, 5))}
    return {
        "plain": [SamplingParams(**common | wish) for wish in plain],
        "mixed": [SamplingParams(**common | wish) for wish in WISHES],
    }


def generate(llm) -> dict[str, list[Any]]:
    """The finished rows of each batch."""
    return {
        name: llm.generate(prompts(), params, use_tqdm=False)
        for name, params in batches().items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    """By variant, what the CPU gives: computed once."""
    return {}


def on_the_cpu(variant: str, expected: dict, tiny_checkpoint, local_llm) -> dict[str, list[Any]]:
    if variant not in expected:
        family, changes = VARIANTS[variant]
        expected[variant] = generate(local_llm(tiny_checkpoint(family, **changes), device="cpu", max_num_seqs=16))
    return expected[variant]


def numbers(output) -> tuple[list, list[float]]:
    """(everything exact, log-probabilities) of a finished row."""
    completion = output.outputs[0]
    exact: list = [list(completion.token_ids), completion.finish_reason, completion.stop_reason]
    close = []
    for entry in [*(completion.logprobs or []), *(output.prompt_logprobs or [])]:
        exact.append(entry and [(token_id, value.rank) for token_id, value in entry.items()])
        close += [value.logprob for value in (entry or {}).values()]
    return exact, close


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_the_references_on_the_cpu(variant, way, expected, tiny_checkpoint, local_llm) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    wanted = on_the_cpu(variant, expected, tiny_checkpoint, local_llm)
    family, changes = VARIANTS[variant]
    llm = local_llm(tiny_checkpoint(family, **changes), device="cuda", max_num_seqs=16, **WAYS[way])
    found = generate(llm)
    for batch in wanted:
        for row, (ours, theirs) in enumerate(zip(found[batch], wanted[batch], strict=True)):
            (exact, close), (exact_wanted, close_wanted) = numbers(ours), numbers(theirs)
            assert exact == exact_wanted, (batch, row)
            assert close == pytest.approx(close_wanted, abs=1e-4), (batch, row)
    assert {len(o.outputs[0].token_ids) for o in found["plain"]} > {NUM_TOKENS}, "no row ended inside a burst"
    graphs = llm.llm_engine.runner.graphs
    if WAYS[way].get("enforce_eager"):
        assert graphs is None
    else:
        assert graphs._graphs, "no step was a graph"


@pytest.mark.usefixtures("overcommit")
@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_in_small_chunks_and_a_small_cache(variant, expected, tiny_checkpoint, local_llm) -> None:
    """Prefill in pieces beside decoding rows, and rows thrown out and computed anew."""
    wanted = on_the_cpu(variant, expected, tiny_checkpoint, local_llm)
    family, changes = VARIANTS[variant]
    longest = max(map(len, prompts())) + NUM_TOKENS
    llm = local_llm(
        tiny_checkpoint(family, **changes), device="cuda", max_num_seqs=16, max_num_batched_tokens=24,
        num_gpu_blocks_override=2 * -(-longest // 16), enable_prefix_caching=False,
    )  # fmt: skip
    for batch, outputs in generate(llm).items():
        for ours, theirs in zip(outputs, wanted[batch], strict=True):
            assert numbers(ours)[0] == numbers(theirs)[0]
    assert llm.llm_engine.scheduler.stats.num_preemptions >= 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_as_exact_as_transformers(variant, tiny_checkpoint, local_llm) -> None:
    """Against float32 on the CPU with the same (bfloat16) weights, in spacings of bfloat16 at the best logit.

    tests/e2e/test_smollm2.py lets greedy rows part where the best two lie within 2 spacings. These models' logits are
    too small for that: their differences err by 0.65 to 1.1 spacings (root mean square) whoever computes them, and
    transformers' own choices part at up to 4.8. So the measure is what transformers errs by, on the same card.
    """
    family, changes = VARIANTS[variant]
    folder = tiny_checkpoint(family, dtype="bfloat16", **changes)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    reference = local_llm(folder, device="cpu", dtype="float32").generate(prompts(), params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in reference]
    forced = [prompt + row for prompt, row in zip(prompts(), tokens, strict=True)]
    exact = generated_part(logits_of(folder, forced, torch.float32, "cpu"))
    theirs = differences(generated_part(logits_of(folder, forced, torch.bfloat16, "cuda")), exact)
    llm = local_llm(folder, device="cuda", dtype="bfloat16", max_logprobs=-1)
    scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1)
    scored = [every_logprob(output.prompt_logprobs) for output in llm.generate(forced, scoring, use_tqdm=False)]
    ours = differences(generated_part(scored), exact)
    assert float(ours.square().mean().sqrt()) <= 1.1 * float(theirs.square().mean().sqrt())
    widest = max(2.0, 4 * float(theirs.square().mean().sqrt()))
    for output, row, logits in zip(llm.generate(prompts(), params, use_tqdm=False), tokens, exact, strict=True):
        found = list(output.outputs[0].token_ids)
        parted = next((step for step in range(NUM_TOKENS) if found[step] != row[step]), None)
        if parted is not None:
            best, chosen = logits[parted].max(), logits[parted, found[parted]]
            assert float(best - chosen) <= widest * spacing(float(best))


def short_rows(llm, count: int) -> list[list[int]]:
    """Tokens of so many rows of a few tokens each, greedy and random ones in turn."""
    rng = random.Random(5)
    rows = [[rng.randrange(3, 250) for _ in range(rng.randrange(1, 20))] for _ in range(count)]
    wishes = [GREEDY if i % 2 else SEEDED | {"seed": i} for i in range(count)]
    params = [SamplingParams(max_tokens=rng.randrange(8, 25), ignore_eos=True, **wish) for wish in wishes]
    return [list(output.outputs[0].token_ids) for output in llm.generate(rows, params, use_tqdm=False)]


@pytest.mark.gpu
@needs_gpu
def test_two_thousand_places(tiny_checkpoint, local_llm) -> None:
    """More rows at once than a program of attention looks at together, in the largest graphs, and without graphs."""
    folder = tiny_checkpoint("llama")
    graphs = local_llm(folder, device="cuda", max_num_seqs=2048, **WAYS["graphs-bursts"])
    found = short_rows(graphs, 1500)
    assert max(size for size, _ in graphs.llm_engine.runner.graphs._graphs) > 1024
    eager = local_llm(folder, device="cuda", max_num_seqs=2048, **WAYS["eager-bursts"])
    assert short_rows(eager, 1500) == found
    assert short_rows(local_llm(folder, device="cpu", max_num_seqs=2048), 1500)[:200] == found[:200]


def spacing(value: float) -> float:
    """Of bfloat16 numbers there."""
    return 2.0 ** (math.floor(math.log2(abs(value))) - 7)


def generated_part(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of [positions, vocab], the positions whose next token was generated."""
    return [row[len(prompt) - 1 : -1] for prompt, row in zip(prompts(), rows, strict=True)]


def differences(found: list[torch.Tensor], exact: list[torch.Tensor]) -> torch.Tensor:
    """By how much logits, taken from that of the likeliest id, are off, in spacings there."""
    off = []
    for ours, row in zip(found, exact, strict=True):
        best = row.argmax(dim=1, keepdim=True)
        scale = torch.tensor([[spacing(float(value))] for value in row.gather(1, best)])
        off.append(((ours - ours.gather(1, best)) - (row - row.gather(1, best))) / scale)
    return torch.cat(off)


def every_logprob(entries: list[Any]) -> torch.Tensor:
    """Log-probabilities [positions, vocab], each of what follows the position; the last one is not known."""
    rows = [[entry[token].logprob for token in range(len(entry))] for entry in entries[1:]]
    return torch.tensor([*rows, [math.nan] * len(rows[0])])


def logits_of(folder: str, sequences: list[list[int]], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """By transformers: [positions, vocab] of each sequence."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    with torch.inference_mode():
        return [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in sequences]


def test_every_family_is_here(tiny_checkpoint) -> None:
    import json
    import pathlib

    found = set()
    for family, changes in VARIANTS.values():
        config = json.loads((pathlib.Path(tiny_checkpoint(family, **changes)) / "config.json").read_text())
        found |= set(config["architectures"])
    assert set(MODELS) <= found
