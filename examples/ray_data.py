"""Answers as a step of a Ray Data pipeline: python examples/ray_data.py MODEL"""

import sys
from typing import Any

from shoal.data import build_processor

COUNTRIES = [{"country": name} for name in ("France", "Italy", "", "Japan")]


def ask(row: dict[str, Any]) -> dict[str, Any]:
    if not row["country"]:
        raise ValueError("the row names no country")
    question = f"What is the capital of {row['country']}?"
    return {"messages": [{"role": "user", "content": question}], "sampling_params": {"max_tokens": 24}}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"country": row["country"], "answer": row["generated_text"], "tokens": row["num_generated_tokens"]}


if __name__ == "__main__":
    config = {"engine": {"model": sys.argv[1], "max_model_len": 512}, "sampling_params": {"temperature": 0.0}}
    processor = build_processor(config, preprocess=ask, postprocess=keep)

    import ray.data  # after build_processor, which joins or starts Ray

    for row in processor(ray.data.from_items(COUNTRIES)).iter_rows():
        print(f"{row['country']!r} -> {row['error']['message'] if row['error'] else row['answer']!r}")
