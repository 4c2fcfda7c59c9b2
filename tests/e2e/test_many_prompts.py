"""Tens of thousands of prompts in one call: fed lazily, with bounded memory in the driver and an early sign of life."""

from __future__ import annotations

import time

import pytest

from shoal import LLM, SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def llm(ray_cluster, tiny_checkpoint):
    folder = tiny_checkpoint("llama", num_hidden_layers=2)
    with LLM(folder, dtype="float32", load_format="dummy", max_model_len=64, max_num_seqs=256) as engine:
        yield engine


class Bar:
    """A tqdm that remembers when it was first drawn."""

    def __init__(self, *args, **kwargs) -> None:
        self.total, self.n, self.made = kwargs["total"], 0, time.monotonic()
        Bar.last = self

    def update(self, n=1) -> None:
        self.n += n

    def refresh(self) -> None: ...

    def set_postfix_str(self, *args, **kwargs) -> None: ...

    def close(self) -> None: ...


def private_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def run(llm, count: int):
    prompts = [[3 + (i * 7 + j) % 300 for j in range(1 + i % 32)] for i in range(count)]
    start = time.monotonic()
    outputs = llm.generate(prompts, PARAMS, use_tqdm=Bar)
    assert Bar.last.made - start < 2
    assert Bar.last.n == Bar.last.total == count
    assert [o.prompt_token_ids for o in outputs[:50]] == prompts[:50]
    assert all(len(o.outputs[0].token_ids) == 2 for o in outputs)
    first_finish = min(o.metrics.last_token_ts for o in outputs)
    assert first_finish < max(o.metrics.arrival_time for o in outputs)
    return outputs


@pytest.mark.timeout(600)
def test_bounded_feeding(llm) -> None:
    pid = llm.llm_engine.driver_pid()
    run(llm, 10_000)
    before = private_bytes(pid)
    run(llm, 25_000)
    assert private_bytes(pid) - before <= 50 << 20
    gauges = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    assert gauges["shoal:max_unfinished_requests"] <= 4 * 256
