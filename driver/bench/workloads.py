"""What is run: requests of token ids, drawn from a seed. A workload is one row in WORKLOADS."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

MAX_TOKEN_ID = 10000  # of drawn prompts: within every vocabulary in use


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A prompt and how many tokens to generate after it."""

    prompt: list[int]
    num_output: int
    prefix: int = -1  # which of the shared prefixes it begins with; -1: none
    prefix_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How requests are drawn; ranges have both ends included."""

    summary: str
    model: str  # a key of models.CONFIGS
    draw: Callable[[Workload], list[BenchRequest]]
    num_requests: int
    input_len: tuple[int, int]  # without the shared prefix
    output_len: tuple[int, int]
    output_mu: float | None = None  # output lengths are lognormal(mu, sigma), clipped to output_len
    output_sigma: float | None = None
    num_prefixes: int | None = None
    prefix_len: int | None = None
    temperature: float = 0.6
    workload_seed: int = 0


def _ids(rng: random.Random, lengths: tuple[int, int]) -> list[int]:
    return [rng.randint(0, MAX_TOKEN_ID) for _ in range(rng.randint(*lengths))]


def _uniform(work: Workload) -> list[BenchRequest]:
    """All prompts first, then all lengths, from one stream: the order is part of nano-vllm's benchmark."""
    rng = random.Random(work.workload_seed)
    prompts = [_ids(rng, work.input_len) for _ in range(work.num_requests)]
    return [BenchRequest(prompt, rng.randint(*work.output_len)) for prompt in prompts]


def _lognormal(work: Workload) -> list[BenchRequest]:
    """A few outputs are many times longer than most."""
    assert work.output_mu is not None
    assert work.output_sigma is not None
    rng = random.Random(work.workload_seed)
    prompts = [_ids(rng, work.input_len) for _ in range(work.num_requests)]
    low, high = work.output_len
    beyond = math.log(high) + 1  # whose exponential may be beyond a float, too
    logs = [min(rng.normalvariate(work.output_mu, work.output_sigma), beyond) for _ in prompts]
    return [BenchRequest(p, min(max(round(math.exp(x)), low), high)) for p, x in zip(prompts, logs, strict=True)]


def _shared(work: Workload) -> list[BenchRequest]:
    """Each prefix goes to equally many requests, and these do not stand together."""
    assert work.num_prefixes is not None
    assert work.prefix_len is not None
    rng = random.Random(work.workload_seed)
    length = work.prefix_len
    prefixes = [_ids(rng, (length, length)) for _ in range(work.num_prefixes)]
    requests = []
    for index in range(work.num_requests):
        prefix = index % work.num_prefixes
        own = _ids(rng, work.input_len)
        requests.append(BenchRequest(prefixes[prefix] + own, rng.randint(*work.output_len), prefix, length))
    rng.shuffle(requests)
    return requests


WORKLOADS: Mapping[str, Workload] = {
    "nano": Workload(
        summary="nano-vllm's benchmark: all lengths uniform in 100-1024",
        model="qwen3-0.6b",
        draw=_uniform,
        num_requests=256,
        input_len=(100, 1024),
        output_len=(100, 1024),
    ),
    "dense": Workload(
        summary="long prompts, short outputs: mostly matrix products",
        model="llama-3.1-8b",
        draw=_uniform,
        num_requests=512,
        input_len=(1024, 1024),
        output_len=(128, 128),
    ),
    "decode": Workload(
        summary="short prompts, long outputs: mostly reading the KV cache",
        model="llama-3.1-8b",
        draw=_uniform,
        num_requests=512,
        input_len=(128, 128),
        output_len=(1024, 1024),
    ),
    "longtail": Workload(
        summary="lognormal output lengths: a few rows run long after the rest",
        model="qwen3-0.6b",
        draw=_lognormal,
        num_requests=400,
        input_len=(32, 512),
        output_len=(16, 3000),
        output_mu=5.5,
        output_sigma=1.0,
    ),
    "prefix": Workload(
        summary="prompts that share long prefixes, shuffled",
        model="llama-3.1-8b",
        draw=_shared,
        num_requests=1024,
        input_len=(64, 64),
        output_len=(64, 64),
        num_prefixes=32,
        prefix_len=2048,
    ),
}


def get_workload(name: str, **changes: Any) -> Workload:
    """The workload of that name with other sizes; ValueError for an unknown one, or a size it does not have."""
    if name not in WORKLOADS:
        near = difflib.get_close_matches(name, WORKLOADS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown workload {name!r}, known: {', '.join(WORKLOADS)}{hint}")
    work = WORKLOADS[name]
    for field, value in changes.items():
        if getattr(work, field) is None:
            raise ValueError(f"workload {name!r} has no {field}, got {field}={value}")
    work = replace(work, **changes)
    _check(work)
    return work


def _check(work: Workload) -> None:
    for field in ("num_requests", "num_prefixes", "prefix_len"):
        value = getattr(work, field)
        if value is not None and value < 1:
            raise ValueError(f"{field} must be at least 1, got {value}")
    for field in ("input_len", "output_len"):
        low, high = getattr(work, field)
        if not 1 <= low <= high:
            raise ValueError(f"{field} must be MIN:MAX with 1 <= MIN <= MAX, got {low}:{high}")
    for field in ("output_mu", "output_sigma"):
        value = getattr(work, field)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{field} must be a finite number, got {value}")
    if work.output_sigma is not None and work.output_sigma < 0:
        raise ValueError(f"output_sigma must be at least 0, got {work.output_sigma}")
    if not 0 <= work.temperature <= 2:
        raise ValueError(f"temperature must be in [0, 2], got {work.temperature}")
