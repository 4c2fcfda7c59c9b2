"""Users' mistakes: each a clear error that names the thing, and the next call works."""

from __future__ import annotations

import math
import shutil

import pytest

from shoal import SamplingParams

GOOD = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def llm(tiny_checkpoint, local_llm):
    return local_llm(tiny_checkpoint("llama"), max_num_seqs=4)


@pytest.mark.parametrize(
    ("prompts", "params", "error", "text"),
    [
        ([[5] * 300], GOOD, ValueError, "maximum context length is 256"),
        ([[5] * 256], GOOD, ValueError, "256"),
        ([[5], []], GOOD, ValueError, "decoder prompt cannot be empty"),
        ([[5], [5, 999]], GOOD, ValueError, "999 is out of vocabulary"),
        ([[5], [5, -1]], GOOD, ValueError, "-1 is out of vocabulary"),
        ([[5], [6]], [GOOD], ValueError, r"prompts \(2\) and params \(1\)"),
        (3.5, GOOD, TypeError, "string, list of tokens, or dictionary"),
        ([{"text": "x"}], GOOD, TypeError, "must contain text, tokens, or embeddings"),
        ([["a", "b"]], GOOD, TypeError, "list of integers"),
        ([[5]], "hot", TypeError, "SamplingParams"),
        ([[5]], SamplingParams(logprobs=50), ValueError, "max allowed: 20"),
        ([[5]], SamplingParams(logit_bias={9999: 1.0}), ValueError, "9999"),
        ([[5]], SamplingParams(allowed_token_ids=[4000]), ValueError, "out-of-vocab"),
        ("x" * 2_000_000, GOOD, ValueError, "maximum context length is 256"),
        ("a \ud800 b", GOOD, ValueError, "surrogate"),
    ],
)
def test_bad_requests(llm, prompts, params, error, text) -> None:
    with pytest.raises(error, match=text):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.llm_engine.scheduler.num_unfinished == 0
    (output,) = llm.generate([[5, 6]], GOOD, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_a_bad_row_raises_after_good_ones_ran_and_leaves_the_engine_clean(llm) -> None:
    with pytest.raises(ValueError, match="empty"):
        llm.generate([[5, 6]] * 40 + [[]], GOOD, use_tqdm=False)
    assert llm.llm_engine.scheduler.num_unfinished == 0
    outputs = llm.generate([[5, 6]] * 3, GOOD, use_tqdm=False)
    assert [len(o.outputs) for o in outputs] == [1, 1, 1]


def test_errors_in_place(llm) -> None:
    prompts = [[5, 6], [], "fine", [5] * 300, [9999], {"prompt_token_ids": [7]}, {"nothing": 1}]
    outputs = llm.generate(prompts, GOOD, use_tqdm=False, on_error="return")
    assert [bool(o.error) for o in outputs] == [False, True, False, True, True, False, True]
    assert [len(o.outputs) for o in outputs] == [1, 0, 1, 0, 0, 1, 0]
    assert "cannot be empty" in outputs[1].error
    with pytest.raises(ValueError, match="on_error"):
        llm.generate([[5]], GOOD, on_error="ignore")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_bad_temperature(value) -> None:
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams(temperature=value)


def test_a_request_larger_than_the_cache(tiny_checkpoint, local_llm) -> None:
    llm = local_llm(tiny_checkpoint("llama"), num_gpu_blocks_override=4)
    with pytest.raises(ValueError, match="longest prompt that fits has 64 tokens"):
        llm.generate([[5] * 80], GOOD, use_tqdm=False)
    big, fits = llm.generate(
        [[5] * 80, [5] * 10], SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False, on_error="return"
    )
    assert "longest prompt that fits has 64 tokens" in big.error
    assert fits.outputs[0].finish_reason == "length"
    assert len(fits.outputs[0].token_ids) == 55


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_modle_len": 5}, TypeError, "did you mean 'max_model_len'"),
        ({"max_num_seqs": "many"}, ValueError, "max_num_seqs"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs"),
        (
            {"max_num_seqs": 64, "max_num_batched_tokens": 32},
            ValueError,
            "must be greater than or equal to max_num_seqs",
        ),
        ({"gpu_memory_utilization": 1.5}, ValueError, "gpu_memory_utilization"),
        ({"max_model_len": 100000}, ValueError, "greater than the derived max_model_len"),
        ({"quantization": "fp8"}, ValueError, "quantization='fp8'"),
        ({"enable_lora": True}, ValueError, "LoRA"),
        ({"kv_cache_memory_bytes": 4096}, ValueError, "KV cache is needed|No available memory"),
        ({"hf_overrides": {"architectures": ["LlamaForCausalLn"]}}, ValueError, "LlamaForCausalLM"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 64, "max_num_seqs": 4},
            ValueError,
            "enable_chunked_prefill",
        ),
    ],
    ids=str,
)
def test_bad_engine_arguments(tiny_checkpoint, local_llm, arguments, error, text) -> None:
    with pytest.raises(error, match=text):
        local_llm(tiny_checkpoint("llama"), **arguments)


def test_bad_checkpoints(tiny_checkpoint, local_llm, tmp_path) -> None:
    source = tiny_checkpoint("llama")
    with pytest.raises(ValueError, match="Invalid repository ID or local directory"):
        local_llm(str(tmp_path / "nowhere"))
    bare = shutil.copytree(source, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        local_llm(str(bare))
    broken = shutil.copytree(source, tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        local_llm(str(broken))


def test_refused_by_name(llm) -> None:
    with pytest.raises(ValueError, match="lora_request"):
        llm.generate([[5]], GOOD, lora_request=object())
    with pytest.raises(ValueError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})
