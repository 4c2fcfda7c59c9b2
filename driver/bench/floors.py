"""The least time a workload can take on a card whose rates are known: each multiply-add at the rate of large matrix
products, each byte that must be read at the rate of plain reading, one after the other, shared prefixes once.

It is a floor for engines that do not overlap the two kinds of work. What is left out (norms, activations, sampling
beyond reading the logits, launches, communication between ranks) only makes real runs slower.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.driver.bench.workloads import BenchRequest

if TYPE_CHECKING:
    from shoal.workers.models.spec import ModelSpec

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_UNGATED = ("GPT2LMHeadModel", "OPTForCausalLM")  # two matrices in the MLP; three elsewhere


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of all ranks together. Attention of prompts may have a rate of its own."""

    read_bytes_per_s: float
    matmul_flops_per_s: float
    attention_flops_per_s: float


CARDS = {  # nominal read rate, matrix products as measured, attention of prompts as FA3 does it; memory in bytes
    "H100": (Ceilings(3.35e12, 800e12, 550e12), 80e9),
    "H200": (Ceilings(4.80e12, 800e12, 550e12), 141e9),
}
_USED_SHARE, _RESERVED_BYTES = 0.9, 3e9  # of a card's memory; what activations and the runtime take


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that each kind of work takes at least, and how many decode steps there are."""

    prefill_s: float
    weights_s: float  # matrix products of decode steps: reading weights, or computing where that takes longer
    kv_s: float
    logits_s: float
    num_steps: int

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
        return self.prefill_s + self.weights_s + self.kv_s + self.logits_s

    @property
    def overlapped_seconds(self) -> float:
        """If reading the cache and the logits hid entirely under matrix products, or the other way round."""
        return max(self.prefill_s + self.weights_s, self.kv_s + self.logits_s)


def layer_params(spec: ModelSpec) -> int:
    """Weights of the matrices in the layers."""
    d = spec.hidden_size
    attention = d * (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return spec.num_layers * (attention + (2 if spec.architecture in _UNGATED else 3) * d * spec.intermediate_size)


def head_params(spec: ModelSpec) -> int:
    """Weights of the LM head."""
    return spec.vocab_size * (spec.word_embed_proj_dim or spec.hidden_size)


def kv_bytes_per_token(spec: ModelSpec, item_bytes: int) -> int:
    """Bytes of the KV cache for each token."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * item_bytes


def weight_bytes(spec: ModelSpec, item_bytes: int) -> int:
    """Bytes of all weights that count: matrices of the layers, LM head, embedding where it is another."""
    return (layer_params(spec) + head_params(spec) * (1 if spec.tie_word_embeddings else 2)) * item_bytes


def kv_room(spec: ModelSpec, memory: float, item_bytes: int) -> int:
    """Tokens of KV that fit beside the weights into `memory` bytes of cards."""
    free = memory * _USED_SHARE - weight_bytes(spec, item_bytes) - _RESERVED_BYTES
    return max(0, int(free / kv_bytes_per_token(spec, item_bytes)))


def attention_flops(spec: ModelSpec, context: float) -> float:
    """Of one query over `context` keys, all layers."""
    return 4.0 * spec.num_layers * spec.num_heads * spec.head_dim * context


def prefill_seconds(spec: ModelSpec, ceilings: Ceilings, num_tokens: int, num_cached: int = 0) -> float:
    """A prompt of `num_tokens`, of which the first `num_cached` are there already."""
    new = num_tokens - num_cached
    context = (num_tokens + num_cached) / 2
    return (
        2 * layer_params(spec) * new / ceilings.matmul_flops_per_s
        + attention_flops(spec, context) * new / ceilings.attention_flops_per_s
    )


def decode_seconds(
    spec: ModelSpec, ceilings: Ceilings, num_rows: int, kv_tokens: int, item_bytes: int
) -> tuple[float, float, float]:
    """(matrix products, KV, logits) of a step of `num_rows`, whose contexts are `kv_tokens` in all."""

    def product(params: int) -> float:
        return max(params * item_bytes / ceilings.read_bytes_per_s, 2 * params * num_rows / ceilings.matmul_flops_per_s)

    kv = kv_tokens * kv_bytes_per_token(spec, item_bytes) / ceilings.read_bytes_per_s
    logits = num_rows * spec.vocab_size * 2 * item_bytes / ceilings.read_bytes_per_s  # written and read
    return product(layer_params(spec)) + product(head_params(spec)), kv, logits


def serial_floor(
    spec: ModelSpec,
    ceilings: Ceilings,
    requests: Sequence[BenchRequest],
    *,
    item_bytes: int,
    max_rows: int,
    kv_tokens: int,
) -> Floor:
    """Of these requests in this order, at most `max_rows` at once in a cache of `kv_tokens`. A row is let in when all
    it will need fits, and its place is taken at the next step once it ends."""
    prefill, seen = 0.0, set[int]()
    for request in requests:
        cached = request.prefix_len if request.prefix in seen else 0
        prefill += prefill_seconds(spec, ceilings, len(request.prompt), cached)
        if request.prefix >= 0:
            seen.add(request.prefix)
    sums = np.zeros(3)
    steps = _resident(requests, max_rows, kv_tokens)
    for num_rows, num_tokens in steps:
        sums += decode_seconds(spec, ceilings, num_rows, num_tokens, item_bytes)
    weights, kv, logits = sums.tolist()
    return Floor(prefill, weights, kv, logits, len(steps))


def decode_kv_bytes(spec: ModelSpec, requests: Sequence[BenchRequest], item_bytes: int) -> int:
    """Bytes of KV that the decode steps of all rows read, each row for itself."""
    tokens = 0
    for request in requests:
        n = request.num_output - 1  # the first token comes out of the prompt
        tokens += n * len(request.prompt) + n * (n + 1) // 2
    return tokens * kv_bytes_per_token(spec, item_bytes)


def _resident(requests: Sequence[BenchRequest], max_rows: int, kv_tokens: int) -> list[tuple[int, int]]:
    """(rows, tokens of their contexts with shared prefixes once) of every decode step."""
    waiting = deque(request for request in requests if request.num_output > 1)
    left: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # steps to go, of each running row
    own: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # tokens of its context that are its own
    running: list[BenchRequest] = []
    sharers: Counter[int] = Counter()
    prefix_tokens = used = 0
    steps = []
    while waiting or running:
        admitted: list[BenchRequest] = []
        while waiting and len(running) + len(admitted) < max_rows:
            head = waiting[0]
            shared = head.prefix_len if head.prefix >= 0 and not sharers[head.prefix] else 0
            need = len(head.prompt) - head.prefix_len + head.num_output + shared
            if used + need > kv_tokens and (running or admitted):
                break
            admitted.append(waiting.popleft())
            used += need
            if head.prefix >= 0:
                sharers[head.prefix] += 1
                prefix_tokens += shared
        if admitted:
            running += admitted
            left = np.append(left, [r.num_output - 1 for r in admitted])
            own = np.append(own, [len(r.prompt) - r.prefix_len for r in admitted])
        own += 1
        left -= 1
        steps.append((len(running), int(own.sum()) + prefix_tokens))
        for index in np.flatnonzero(left == 0).tolist():
            gone = running[index]
            used -= len(gone.prompt) - gone.prefix_len + gone.num_output
            if gone.prefix >= 0:
                sharers[gone.prefix] -= 1
                if not sharers[gone.prefix]:
                    used -= gone.prefix_len
                    prefix_tokens -= gone.prefix_len
        stays = left > 0
        running = [request for request, stay in zip(running, stays, strict=True) if stay]
        left, own = left[stays], own[stays]
    return steps
