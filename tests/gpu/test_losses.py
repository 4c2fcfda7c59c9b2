"""GPUs under real engines: a rank that is killed, memory that is short, engines that come and go."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
import torch

from shoal import LLM, SamplingParams
from shoal.driver.bench.models import CONFIGS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
needs_a_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PROMPTS = [[3 + (7 * i + j) % 200 for j in range(1 + 5 * i % 37)] for i in range(200)]
PARAMS = [
    SamplingParams(temperature=0.8 if i % 2 else 0.0, seed=i, max_tokens=64, ignore_eos=True, logprobs=1)
    for i in range(200)
]
SMALL = {"dtype": "float32", "max_num_seqs": 16, "max_model_len": 128, "kv_cache_memory_bytes": 64 << 20}


def ids(outputs):
    return [list(part.token_ids) for output in outputs for part in output.outputs]


def pid_of(worker) -> int:
    return os.getpid()


def used_memory() -> int:
    """MiB of the first GPU that are not free. This process has a context there itself, always of one size."""
    free, total = torch.cuda.mem_get_info(0)
    return (total - free) >> 20


@needs_two_gpus
@pytest.mark.parametrize("layout", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_a_killed_rank_is_replaced(ray_cluster, tiny_checkpoint, layout) -> None:
    """SIGKILL in the middle of a collective: the same float32 tokens, every row once."""
    folder = tiny_checkpoint("llama")
    with LLM(folder, **SMALL, **{layout: 2}) as llm:
        pids = llm.collective_rpc(pid_of)
        expected = ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
        collect, answered, deaths, enough = llm.llm_engine.collect, [], [], threading.Event()

        def noted(timeout):
            collected = collect(timeout)
            answered.extend([time.monotonic()] * len(collected.finished))
            deaths.extend((time.monotonic(), death) for death in collected.deaths)
            if len(answered) >= 40:
                enough.set()
            return collected

        struck = []

        def strike():
            enough.wait()
            struck.append(time.monotonic())
            os.kill(pids[1], signal.SIGKILL)

        llm.llm_engine.collect = noted
        threading.Thread(target=strike, daemon=True).start()
        assert ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
        assert len(deaths) == 1
        next_answer = next(when for when in answered if when > deaths[0][0])
    print(
        f"\nFIGURES {layout}=2, one rank killed: noticed after {deaths[0][0] - struck[0]:.2f} s, next answer after "
        f"{next_answer - struck[0]:.1f} s, {len(expected)} of {len(PROMPTS)} rows",
        flush=True,
    )


def hog(worker) -> int:
    """All but little of the memory that is left; MiB that it took."""
    torch.cuda.empty_cache()
    size = torch.cuda.mem_get_info()[0] - (200 << 20)
    worker.hog = torch.empty(size, dtype=torch.uint8, device="cuda")
    return size >> 20


def let_go(worker) -> None:
    del worker.hog
    torch.cuda.empty_cache()


@needs_a_gpu
def test_steps_that_do_not_fit_the_memory(ray_cluster, tmp_path, capfd) -> None:
    """Somebody else takes the memory that a large step needs: smaller steps, every row answered, by the same rank."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3-0.6b"] | {"bos_token_id": 0, "eos_token_id": 1}))
    arguments = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 1024}
    prompts = [{"prompt_token_ids": [3 + (7 * i + j) % 9000 for j in range(900)]} for i in range(64)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    with LLM(str(tmp_path), kv_cache_memory_bytes=8 << 30, **arguments) as llm:
        pids = llm.collective_rpc(pid_of)
        print(f"\nthe other one took {llm.collective_rpc(hog)} MiB", flush=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [len(tokens) for tokens in ids(outputs)] == [8] * 64
        assert llm.collective_rpc(pid_of) == pids
        llm.collective_rpc(let_go)
        assert len(ids(llm.generate(prompts, params, use_tqdm=False))) == 64
    said, deadline = "", time.monotonic() + 20
    while "did not fit the memory" not in said and time.monotonic() < deadline:  # the log comes later
        said += "".join(capfd.readouterr())
        time.sleep(0.1)
    assert "did not fit the memory" in said, "the test was to make memory short"


@needs_a_gpu
def test_ten_engines_leave_no_memory(ray_cluster, tiny_checkpoint) -> None:
    folder, before, seen = tiny_checkpoint("llama"), used_memory(), []
    for _ in range(10):
        with LLM(folder, **SMALL) as llm:
            assert len(ids(llm.generate(PROMPTS[:4], PARAMS[:4], use_tqdm=False))) == 4
            assert used_memory() > before, "the engine is on this GPU"
        deadline = time.monotonic() + 15
        while used_memory() > before and time.monotonic() < deadline:
            time.sleep(0.1)
        seen.append(used_memory())
    print(f"\nFIGURES memory used before, {before} MiB, and after each of ten engines: {seen}", flush=True)
    assert seen == [before] * 10
