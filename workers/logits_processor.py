"""Custom logits processors: the interface, and how the engine's `logits_processors` argument becomes classes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ProcessLogits = Callable[[list[int], list[int], Tensor], Tensor]


class LogitsProcessor:
    """Base of custom logits processors: `LLM(..., logits_processors=[MyProcessor])`, or "module:MyProcessor".

    Every rank makes one instance when it starts. For each request, `for_request` is given the `extra_args` of its
    SamplingParams and returns a function, or None to leave the request alone. The function runs before each token:

        def ban_repeats(prompt_ids: list[int], output_ids: list[int], logits: Tensor) -> Tensor:
            logits[output_ids] = float("-inf")
            return logits

    `logits` is the row's own float32 copy, [vocab_size], on the rank's device; it may be changed in place. What is
    returned, of the same shape, is used from there on. -inf forbids an id; +inf makes it certain. It comes after
    allowed_token_ids, bad_words, min_tokens, logit_bias and the penalties, before temperature, min_p, top_k and top_p,
    and greedy requests too pass through it. Returned logprobs are those of the untouched logits. The function must be
    a pure function of its arguments: after a preemption, and on every rank of a tensor-parallel group, it is called
    anew and has to answer the same. Requests with a processor decode one step at a time.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device

    def for_request(self, extra_args: dict[str, Any]) -> ProcessLogits | None:
        """The function to apply to a request with these extra_args, or None."""
        raise NotImplementedError(f"{type(self).__name__} must define for_request(extra_args)")


def resolve_processors(entries: Sequence[Any]) -> list[type]:
    """Classes from classes and "module:Class" strings. ValueError names an entry that is neither."""
    return [_resolve(entry) for entry in entries]


def _resolve(entry: Any) -> type:
    found = entry
    if isinstance(entry, str):
        module_name, _, class_name = entry.partition(":")
        if not module_name or not class_name:
            raise ValueError(f'logits_processors: {entry!r} must have the form "module:Class"')
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"logits_processors: cannot load {entry!r}: {error}") from error
    if not isinstance(found, type) or not callable(getattr(found, "for_request", None)):
        raise ValueError(
            f"logits_processors: {entry!r} must be a class with a for_request method "
            "(interface: shoal.workers.sampler.LogitsProcessor)"
        )
    return found
