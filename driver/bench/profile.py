"""A third run, with the profiler: the workload's rows, as many as fit, all decoding at once for some seconds.

Its rates are not reported. The rows get outputs long enough to stay together while the rank watches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shoal.driver.bench.throughput import sampling
from shoal.driver.bench.workloads import BenchRequest
from shoal.driver.llm import LLM
from shoal.driver.outputs import RequestOutput
from shoal.workers.decode_watch import end_watch, start_watch

_TRIAL_TOKENS = 33  # how long rows decode to find out how long a step takes
_LEAST_ROOM = 2  # tokens: a step is timed between two
_HOST_SHARE = 0.2  # of the window: how long the host is timed before it
_SLACK, _SPARE_TOKENS = 1.25, 128  # the trial may have met a slow moment
_PROMPT_SHARE = 0.75  # of max_model_len that a prompt may take: what is longer is cut, to leave room for outputs
_KV_SHARE = 0.95  # of the cache that rows may fill: the last block of each is partly empty


class NoProfile(RuntimeError):
    """The rows did not decode together for long enough."""


def profile_decode(llm: LLM, requests: Sequence[BenchRequest], temperature: float, seconds: float) -> dict[str, Any]:
    """What rank 0 saw in `seconds` of decoding a full batch, or as long as the rows may become. Raises NoProfile."""
    longest = math.floor(_PROMPT_SHARE * llm.resolved.max_model_len)
    rows = [replace(r, prompt=r.prompt[:longest]) for r in requests[: llm.resolved.max_num_seqs]]
    room = llm.resolved.max_model_len - max(len(row.prompt) for row in rows)
    if room < _LEAST_ROOM:
        raise NoProfile(f"max_model_len ({llm.resolved.max_model_len}) leaves no room to decode in")
    trial = _generate(llm, rows, min(room, _TRIAL_TOKENS), temperature)
    rate = _SLACK * (1 + _HOST_SHARE) / _step_seconds(trial)  # tokens that a second of profile takes
    spare = min(_SPARE_TOKENS, room // 2)
    seconds = min(seconds, (room - spare) / rate)
    length = math.ceil(rate * seconds) + spare
    rows = _fitting(rows, length, math.floor(_KV_SHARE * llm.resolved.kv_cache_tokens))
    llm.collective_rpc(start_watch, args=(len(rows), _HOST_SHARE * seconds, seconds))
    _generate(llm, rows, length, temperature)
    seen: dict[str, Any] | None = llm.collective_rpc(end_watch)[0]
    if seen is None:
        raise NoProfile(
            f"{len(rows)} rows never decoded together for {_HOST_SHARE * seconds:g} s and more: a profile needs a "
            f"larger max_model_len ({llm.resolved.max_model_len}) or fewer --profile-seconds ({seconds:g})"
        )
    return seen


def _generate(llm: LLM, rows: Sequence[BenchRequest], length: int, temperature: float) -> list[RequestOutput]:
    prompts = [{"prompt_token_ids": row.prompt} for row in rows]
    return llm.generate(prompts, sampling(length, temperature), use_tqdm=False)


def _step_seconds(outputs: Sequence[RequestOutput]) -> float:
    """Of the row that met the fewest prompts of others: it came last."""
    spans = []
    for output in outputs:
        assert output.metrics is not None
        metrics = output.metrics
        spans.append((metrics.last_token_ts - metrics.first_token_ts) / (metrics.num_generation_tokens - 1))
    return min(spans)


def _fitting(rows: Sequence[BenchRequest], length: int, kv_tokens: int) -> list[BenchRequest]:
    """As many as the cache holds with outputs of this length, shared prefixes once; at least one."""
    kept: list[BenchRequest] = []
    seen = set[int]()
    used = 0
    for row in rows:
        shared = min(row.prefix_len, len(row.prompt)) if row.prefix in seen else 0
        used += len(row.prompt) + length - shared
        if used > kv_tokens and kept:
            break
        kept.append(row)
        if row.prefix >= 0:
            seen.add(row.prefix)
    return kept
