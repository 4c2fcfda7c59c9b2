"""A logits processor of one's own: no run of n tokens may appear twice in an output.

Argument: a model folder, a .gguf file or a hub id.
"""

import sys
from typing import Any

import torch

from shoal import LLM, SamplingParams
from shoal.workers.logits_processor import LogitsProcessor, ProcessLogits


class NoRepeatedNgrams(LogitsProcessor):
    """Reads n from SamplingParams(extra_args={"no_repeat_ngram": n}); rows without it are left alone."""

    def for_request(self, extra_args: dict[str, Any]) -> ProcessLogits | None:
        size = extra_args.get("no_repeat_ngram")
        if size is None:
            return None

        def process(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            last = output_ids[len(output_ids) - size + 1 :] if size > 1 else []
            starts = range(len(output_ids) - size + 1)
            banned = [output_ids[i + size - 1] for i in starts if output_ids[i : i + size - 1] == last]
            logits[banned] = float("-inf")
            return logits

        return process


prompt = "A, B, C, A, B, C, A, B, C, A,"
with LLM(model=sys.argv[1], logits_processors=[NoRepeatedNgrams]) as llm:
    for extra_args in (None, {"no_repeat_ngram": 3}):
        params = SamplingParams(temperature=0.0, max_tokens=32, extra_args=extra_args)
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        print(f"{extra_args}: {output.outputs[0].text!r}")
