"""A logits processor of one's own: no run of n tokens may appear twice in an output.

Argument: a model folder, a .gguf file or a hub id.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal import LLM, SamplingParams
from shoal.workers.sampler import LogitsProcessor

RowProcessor = Callable[[Sequence[int], Sequence[int], torch.Tensor], torch.Tensor]


class NoRepeatedNgrams(LogitsProcessor):
    """Reads n from SamplingParams(extra_args={"no_repeat_ngram": n}); rows without it are left alone."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size

    def for_request(self, extra_args: dict[str, Any]) -> RowProcessor | None:
        size = extra_args.get("no_repeat_ngram")
        if size is None:
            return None

        def process(prompt_ids: Sequence[int], output_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            tokens = list(output_ids)
            tail = tokens[len(tokens) - size + 1 :] if size > 1 else []
            starts = range(len(tokens) - size + 1)
            banned = [tokens[i + size - 1] for i in starts if tokens[i : i + size - 1] == tail]
            logits[banned] = float("-inf")
            return logits

        return process


prompt = "Roses are red. Roses are red. Roses are red."
with LLM(model=sys.argv[1], logits_processors=[NoRepeatedNgrams]) as llm:
    for extra_args in (None, {"no_repeat_ngram": 3}):
        params = SamplingParams(temperature=0.0, max_tokens=32, extra_args=extra_args)
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        print(f"{extra_args}: {output.outputs[0].text!r}")
