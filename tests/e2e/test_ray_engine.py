"""The engine as users run it: driver and ranks as Ray actors."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shoal import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def ids(outputs):
    return [list(part.token_ids) for output in outputs for part in output.outputs]


@pytest.fixture(scope="module")
def llm(ray_cluster, tiny_checkpoint):
    with LLM(
        tiny_checkpoint("llama"), dtype="float32", max_num_seqs=16, enable_sleep_mode=True, max_model_len=128
    ) as engine:
        yield engine


PROMPTS = [[3 + (7 * i + j) % 200 for j in range(1 + 5 * i % 37)] for i in range(16)]
SEEDED = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True, logprobs=2)


def test_tensor_parallel_and_channels_agree(llm, ray_cluster, tiny_checkpoint) -> None:
    expected, seeded = (
        ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)),
        ids(llm.generate(PROMPTS, SEEDED, use_tqdm=False)),
    )
    folder = tiny_checkpoint("llama")
    for arguments in (
        {"tensor_parallel_size": 2, "decode_burst": 8},
        {"step_channel": "ray", "decode_burst": 2},
        {"pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "step_channel": "ray"},
    ):
        with LLM(folder, dtype="float32", max_num_seqs=16, max_model_len=128, **arguments) as other:
            assert ids(other.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
            assert ids(other.generate(PROMPTS, SEEDED, use_tqdm=False)) == seeded
            assert other.collective_rpc("weight_bytes")[0] > 0
            ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
            assert len(other.collective_rpc("weight_bytes")) == other.get_world_size() == ranks


def test_calls_on_workers(llm) -> None:
    assert llm.collective_rpc(double, args=(21,)) == [42]
    assert llm.apply_model(lambda model: type(model).__name__) == ["LlamaForCausalLM"]
    with pytest.raises(AttributeError, match="no_such_method"):
        llm.collective_rpc("no_such_method")
    with pytest.raises(TimeoutError):
        llm.collective_rpc(wait_a_while, timeout=0.1)
    assert ids(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False))


def double(worker, value):
    return 2 * value


def wait_a_while(worker):
    time.sleep(1)


def test_sleep_and_wake_up(llm) -> None:
    expected = ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    for level in (1, 2):
        llm.sleep(level)
        with pytest.raises(RuntimeError, match="wake_up"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        llm.wake_up()
        assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    llm.sleep(1)
    llm.wake_up(tags=["weights"])
    with pytest.raises(RuntimeError, match="wake_up"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    llm.wake_up(tags=["kv_cache"])
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_metrics_and_times(llm) -> None:
    output = llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)[0]
    times = output.metrics
    assert times.arrival_time <= times.queued_ts <= times.scheduled_ts <= times.first_token_ts <= times.last_token_ts
    assert times.num_generation_tokens == 24
    metrics = {m.name: m for m in llm.get_metrics()}
    assert metrics["shoal:generation_tokens"].value >= 24
    assert (
        metrics["shoal:request_generation_tokens"].buckets["+Inf"] == metrics["shoal:request_generation_tokens"].count
    )
    assert llm.reset_prefix_cache()


def test_enqueue_and_wait(llm) -> None:
    expected = ids(llm.generate(PROMPTS[:5], GREEDY, use_tqdm=False))
    first = llm.enqueue(PROMPTS[:2], GREEDY, use_tqdm=False)
    second = llm.enqueue(PROMPTS[2:5], GREEDY, use_tqdm=False)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [o.request_id for o in outputs] == first + second
    assert ids(outputs) == expected


def test_interrupt_leaves_nothing_behind(llm) -> None:
    expected = ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS * 200, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), use_tqdm=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    gauges = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    assert gauges["shoal:num_requests_running"] == gauges["shoal:num_requests_waiting"] == 0


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_dead_rank_is_replaced(ray_cluster, tiny_checkpoint, local_llm) -> None:
    """Killed while idle and in the middle of a call: every row comes out as if nothing had been."""
    folder = tiny_checkpoint("llama")
    every = [
        SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.8, seed=5, max_tokens=60, ignore_eos=True, prompt_logprobs=1),
    ]
    prompts, params = PROMPTS * 4, (every * 32)[:64]
    expected = local_llm(folder, max_num_seqs=16).generate(prompts, params, use_tqdm=False)
    with LLM(folder, dtype="float32", max_num_seqs=16, tensor_parallel_size=2, decode_burst=1) as llm:
        os.kill(llm.collective_rpc(worker_pid)[1], signal.SIGKILL)
        assert ids(llm.generate(prompts[:1], params[:1], use_tqdm=False)) == ids(expected[:1])
        victim = llm.collective_rpc(worker_pid)[1]
        llm.collective_rpc(end_in, args=(1.0,), timeout=30)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert ids(outputs) == ids(expected)
        for output, other in zip(outputs, expected, strict=True):
            assert len(output.prompt_logprobs or []) == len(other.prompt_logprobs or [])
            for found, wanted in zip(output.outputs[0].logprobs or [], other.outputs[0].logprobs or [], strict=True):
                assert {t: e.logprob for t, e in found.items()} == pytest.approx(
                    {t: e.logprob for t, e in wanted.items()}, abs=1e-4
                )
        assert victim not in llm.collective_rpc(worker_pid)
        assert {m.name: m for m in llm.get_metrics()}["shoal:engine_restarts"].value == 2


def test_restarts_are_bounded(ray_cluster, tiny_checkpoint) -> None:
    llm = LLM(tiny_checkpoint("llama"), dtype="float32", max_num_seqs=16, max_rank_restarts=0)
    (pid,) = llm.collective_rpc(worker_pid)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"the ranks died 1 times .*max_rank_restarts=0.*rank 0"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    llm.shutdown()


def end_in(worker, seconds):
    """Rank 1 dies in so many seconds, whatever it does then."""
    import threading

    if worker.rank == 1:
        threading.Timer(seconds, os._exit, (9,)).start()


def worker_pid(worker):
    return os.getpid()


def test_shutdown_frees_everything(ray_cluster, tiny_checkpoint) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    def groups() -> int:
        return sum(g["state"] == "CREATED" for g in placement_group_table().values())

    before, free = groups(), ray.available_resources()["CPU"]
    llm = LLM(tiny_checkpoint("llama"), dtype="float32", max_num_seqs=16, tensor_parallel_size=2)
    pids = llm.collective_rpc(worker_pid)
    assert groups() == before + 1
    llm.shutdown()
    llm.shutdown()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (
        groups() != before or ray.available_resources()["CPU"] < free or any(map(alive, pids))
    ):
        time.sleep(0.2)
    assert groups() == before
    assert ray.available_resources()["CPU"] >= free
    assert not any(map(alive, pids))
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate(PROMPTS, GREEDY)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_start_up_errors_leave_nothing(ray_cluster, tiny_checkpoint) -> None:
    from ray.util.placement_group import placement_group_table

    from shoal.driver.config import make_config
    from shoal.driver.worker_group import WorkerGroup

    folder = tiny_checkpoint("llama")
    with pytest.raises(ValueError, match="estimated maximum model length is 64"):
        LLM(folder, dtype="float32", kv_cache_memory_bytes=64 * 2 * 3 * 2 * 8 * 4)
    with pytest.raises(ValueError, match="divisible by tensor parallel size"):
        LLM(folder, dtype="float32", tensor_parallel_size=4)
    with pytest.raises(ValueError, match=r"layers \(3\) must be at least the pipeline parallel size \(4\)"):
        LLM(folder, dtype="float32", pipeline_parallel_size=4)
    with pytest.raises(RuntimeError, match="could not place"):
        WorkerGroup(make_config(model=folder, tensor_parallel_size=300, placement_timeout_s=1.0), "cpu", {})
    assert not [g for g in placement_group_table().values() if g["state"] == "PENDING"]
