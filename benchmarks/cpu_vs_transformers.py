"""Shoal beside transformers' `generate` on this machine's CPU: the same model, weights, prompts, threads and tokens.

SmolLM2-135M-Instruct in float32, greedy. 64 prompts of mixed lengths are answered with 16 to 96 new tokens each, EOS
ignored, so that both sides do the same work. transformers runs static batches of 16 in input order, padded on the
left, each to the largest budget among its rows; only a row's own budget counts as output, on both sides. No number is
printed unless every row's tokens are equal. Ends with 1 when Shoal is below --min-ratio times transformers.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM

from shoal import LLM, SamplingParams
from shoal.workers.config import LoadConfig
from shoal.workers.loading import iterate_weights

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from demo_weights import weights_path  # noqa: E402  (examples/ is no package)

GIB = 1 << 30
BATCH = 16
PROMPT_LENGTHS = (8, 24, 64, 128, 256, 384)


@dataclass(frozen=True)
class Row:
    """One prompt and how many tokens to make of it."""

    prompt: list[int]
    num_new: int


Run = Callable[[list[Row]], list[list[int]]]


def make_rows(text_ids: list[int], count: int, seed: int) -> list[Row]:
    """Windows of real text, of mixed lengths, with budgets of 16 to 96 tokens; equal for equal seeds."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = rng.choice(PROMPT_LENGTHS) + rng.randrange(8)
        start = rng.randrange(len(text_ids) - length)
        rows.append(Row(text_ids[start : start + length], rng.randint(16, 96)))
    return rows


def reference_model(path: Path) -> LlamaForCausalLM:
    """transformers' model, filled with the tensors that Shoal reads from the file."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = LlamaForCausalLM(config).eval()
    state = {source.name: source.load() for source in iterate_weights(LoadConfig(str(path)))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"weights do not match the model: missing {missing}, unexpected {unexpected}")
    # An eos_token_id of None in a call means "the model's own": rows are to run to their full length.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model.to(torch.float32)


def transformers_run(model: LlamaForCausalLM) -> Run:
    def run(rows: list[Row]) -> list[list[int]]:
        return [tokens for i in range(0, len(rows), BATCH) for tokens in generate_batch(model, rows[i : i + BATCH])]

    return run


@torch.inference_mode()
def generate_batch(model: LlamaForCausalLM, rows: list[Row]) -> list[list[int]]:
    width = max(len(row.prompt) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows])
    mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows])
    longest = max(row.num_new for row in rows)
    options = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=None, pad_token_id=0)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=options)[:, width:].tolist()
    return [tokens[: row.num_new] for tokens, row in zip(output, rows, strict=True)]


def shoal_run(llm: LLM) -> Run:
    def run(rows: list[Row]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": row.prompt} for row in rows]
        params = [SamplingParams(temperature=0.0, max_tokens=row.num_new, ignore_eos=True) for row in rows]
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]

    return run


def check_equal(rows: list[Row], found: dict[str, list[list[int]]]) -> None:
    ours, theirs = found["shoal"], found["transformers"]
    for index, (row, a, b) in enumerate(zip(rows, ours, theirs, strict=True)):
        if a != b or len(a) != row.num_new:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise SystemExit(f"row {index}: tokens part at output {at}: Shoal {a[at:][:4]}, transformers {b[at:][:4]}")


def measure(runs: dict[str, Run], rows: list[Row], repeat: int) -> dict[str, list[float]]:
    """Seconds of each run; the order alternates, so that neither side always meets the warmer machine."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeat):
        found = {}
        for name in list(runs) if round_ % 2 == 0 else reversed(list(runs)):
            gc.collect()
            started = time.perf_counter()
            found[name] = runs[name](rows)
            seconds[name].append(time.perf_counter() - started)
        check_equal(rows, found)
    return seconds


def report(rows: list[Row], seconds: dict[str, list[float]], threads: int) -> dict[str, object]:
    prompt, new = sum(len(row.prompt) for row in rows), sum(row.num_new for row in rows)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = median["transformers"] / median["shoal"]
    print(f"SmolLM2-135M-Instruct, float32, greedy, {threads} threads; {len(rows)} prompts of {prompt} tokens in all,")
    print(f"{new} new tokens; every row's tokens are equal. Median of {len(seconds['shoal'])} runs each:\n")
    print(f"{'':34}{'seconds':>10}{'new tok/s':>12}   runs")
    for name, label in (("shoal", "Shoal"), ("transformers", f"transformers, batches of {BATCH}")):
        runs = " ".join(f"{value:.2f}" for value in seconds[name])
        print(f"{label:34}{median[name]:10.2f}{new / median[name]:12.1f}   {runs}")
    print(f"\nShoal / transformers: {ratio:.2f}")
    return {
        "model": "SmolLM2-135M-Instruct Q4_1, dequantized to float32",
        "threads": threads,
        "num_prompts": len(rows),
        "num_prompt_tokens": prompt,
        "num_new_tokens": new,
        "torch": torch.__version__,
        "seconds": seconds,
        "median_seconds": median,
        "ratio": ratio,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side; the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-ratio", type=float, default=1.5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    threads = len(os.sched_getaffinity(0))
    path = weights_path()
    # Without the prefix cache: a repeated run would find the whole of its prompts there.
    with LLM(model=str(path), dtype="float32", kv_cache_memory_bytes=GIB, enable_prefix_caching=False) as llm:
        (rank_threads,) = llm.collective_rpc(lambda worker: torch.get_num_threads())
        torch.set_num_threads(rank_threads)
        if rank_threads != threads:
            print(f"Shoal's rank computes with {rank_threads} threads of {threads}; so does transformers here")
        conversations = (json.loads(line)["messages"] for line in (ROOT / "examples/prompts.jsonl").open())
        text = "\n\n".join(message["content"] for messages in conversations for message in messages)
        rows = make_rows(llm.get_tokenizer().encode(text), args.num_prompts, args.seed)
        runs = {"shoal": shoal_run(llm), "transformers": transformers_run(reference_model(path))}
        for run in runs.values():  # what is made once (kernels chosen, memory mapped) is not timed
            run([Row(row.prompt, 4) for row in rows[:BATCH]])
        seconds = measure(runs, rows, args.repeat)
    result = report(rows, seconds, rank_threads)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["ratio"] >= args.min_ratio else 1


if __name__ == "__main__":
    sys.exit(main())
