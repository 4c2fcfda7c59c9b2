"""The sampler: logits in, token ids and logprobs out. Each row has its own parameters; each cost is paid by who asks.

Order, for each row: logprobs are those of the untouched logits; allowed_token_ids; bad_words; min_tokens; logit_bias;
repetition, frequency and presence penalties; custom processors; then argmax (temperature 0), or temperature, min_p,
top_k, top_p and a draw. Where all this leaves a row nothing (every logit -inf), it gets the most likely of its
allowed_token_ids, all other wishes aside: a row always gets a token.

A draw uses noise that depends on the row's stream, the number of tokens it has generated and the vocabulary id, and on
nothing else (see kernels/ops/philox.py): the same request gives the same tokens in any company.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.ops import sampling as ops
from shoal.workers.logit_edits import BatchTokens, EditContext
from shoal.workers.logits_processor import LogitsProcessor
from shoal.workers.logprobs import LogprobsTensors, gather_logprobs, score_tokens
from shoal.workers.plan import TokenLogprobs
from shoal.workers.sampling_state import Mode, RowGroup, SamplingState


@dataclass(slots=True)
class SamplerOutput:
    """One step's tokens, on the device."""

    token_ids: Tensor  # int64 [n]
    ended: Tensor  # bool [n]: the token is one of the row's stop ids, and the row has min_tokens with it
    logprobs: LogprobsTensors | None  # of the rows that asked, if any did


class Sampler:
    """Chooses the next token of rows of a persistent batch. Only custom processors make it wait for the device."""

    def __init__(self, state: SamplingState, batch: BatchTokens) -> None:
        self._state = state
        self._batch = batch

    def __call__(self, logits: Tensor, rows: Tensor, host_rows: list[int]) -> SamplerOutput:
        """The next token of each row.

        logits: [n, vocab], any float dtype; not changed. rows: int64 [n], places in the persistent batch, on the
        device; host_rows: the same numbers. ValueError where a custom processor returns something unfit.
        """
        assert logits.shape == (len(host_rows), self._state.vocab_size)
        plan = self._state.plan(host_rows)
        generated = (self._batch.num_tokens[rows] - self._batch.num_prompt_tokens[rows]).to(torch.int64)
        token_ids = torch.empty_like(rows)
        for group in plan.groups:
            chosen = self._choose(group, logits, rows, generated)
            if group.index is None:
                token_ids = chosen
            else:
                token_ids[group.index] = chosen
        ended = (plan.stop_ids == token_ids.unsqueeze(1)).any(dim=1) & (generated + 1 >= plan.min_tokens)
        logprobs = gather_logprobs(logits, token_ids, plan.logprobs) if plan.logprobs else None
        return SamplerOutput(token_ids, ended, logprobs)

    def observe(self, rows: Tensor, token_ids: Tensor) -> None:
        """Takes note of tokens that were appended to their rows: both int64 [n], on the device; -1 is no token."""
        self._state.observe(rows, token_ids)

    def prompt_logprobs(self, logits: Tensor, target_ids: Tensor, k: int) -> TokenLogprobs:
        """Logprobs of target_ids (int64 [m]) and of the k best ids (-1: all) under logits [m, vocab].

        Waits for the device.
        """
        return score_tokens(logits, target_ids, k).to_host()

    def _choose(self, group: RowGroup, logits: Tensor, rows: Tensor, generated: Tensor) -> Tensor:
        if group.index is not None:
            logits, rows, generated = logits[group.index], rows[group.index], generated[group.index]
        forced = None
        if group.edits is not None:
            # Indexing has made a copy already, but float32 of float32 is none.
            logits = logits.to(torch.float32, copy=group.index is None)
            forced = group.edits.apply(logits, EditContext(self._batch, rows, generated))
        chosen = _draw(group, logits, generated)
        return chosen if forced is None else torch.where(forced >= 0, forced, chosen)


def _draw(group: RowGroup, logits: Tensor, generated: Tensor) -> Tensor:
    if group.mode == Mode.GREEDY:
        return ops.greedy(logits)
    if group.mode == Mode.RANDOM:
        return ops.sample(logits, group.temperature, group.log_min_p, group.streams, generated)
    if group.mode == Mode.NUCLEUS:
        return ops.sample_nucleus(logits, group.temperature, group.log_min_p, group.top_p, group.streams, generated)
    limit = group.max_top_k if group.mode == Mode.TOP_K else None
    shaped = (group.temperature, group.log_min_p, group.top_k, group.top_p, group.streams)
    return ops.sample_filtered(logits, *shaped, generated, limit)


__all__ = ["BatchTokens", "LogitsProcessor", "Sampler", "SamplerOutput", "SamplingState"]
