"""ModelSpec: what is read from a config, what is filled in, what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from shoal.workers.layers.rotary import inverse_frequencies
from shoal.workers.models.spec import ModelSpec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(**changes: Any) -> ModelSpec:
    config = {key: value for key, value in (LLAMA | changes).items() if value is not ...}
    return ModelSpec.from_hf(SimpleNamespace(**config))


def test_defaults_of_missing_keys_are_those_of_transformers() -> None:
    bare = read(max_position_embeddings=...)
    full = ModelSpec.from_hf(
        transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "max_position_embeddings"})
    )
    for name in ("num_kv_heads", "head_dim", "norm_eps", "activation", "attention_bias", "mlp_bias", "rope"):
        assert getattr(bare, name) == getattr(full, name), name
    assert bare.max_position_embeddings == full.max_position_embeddings == 2048
    assert bare.tie_word_embeddings is full.tie_word_embeddings is False


@pytest.mark.parametrize("family", ["OPT", "GPT2", "Granite", "Qwen3", "Llama", "Mistral"])
def test_a_raw_config_reads_like_transformers_own(family: str) -> None:
    """A config.json as saved, seen as plain attributes, gives the same numbers as the config object."""
    changes = {"sliding_window": None} if family == "Mistral" else {}
    config = getattr(transformers, f"{family}Config")(**changes)
    config.architectures = ["GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"]
    raw = SimpleNamespace(**config.to_diff_dict() | {"architectures": config.architectures})
    for name, value in config.to_dict().items():  # sizes have no sensible default and must be stated
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(raw, name, value)
    assert ModelSpec.from_hf(raw) == ModelSpec.from_hf(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 512),
        ({"max_position_embeddings": ...}, 2048),
        ({"max_position_embeddings": ..., "seq_length": 300}, 300),
        ({"model_max_length": 400}, 400),
        ({"max_sequence_length": 4000}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1024),
        ({"rope_parameters": YARN}, 512),
        ({"rope_parameters": YARN | {"factor": 6.0}}, 768),
        ({"rope_parameters": LLAMA3}, 512),
    ],
)
def test_model_length(changes: dict[str, Any], expected: int) -> None:
    assert read(**changes).max_position_embeddings == expected


def test_learned_positions_bound_the_length() -> None:
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
    spec = ModelSpec.from_hf(SimpleNamespace(**gpt2, n_positions=77))
    assert (spec.max_position_embeddings, spec.num_positions, spec.intermediate_size) == (77, 77, 32)
    assert ModelSpec.from_hf(SimpleNamespace(**gpt2)).max_position_embeddings == 1024


def test_rope_parameters_old_and_new() -> None:
    new = read(rope_parameters={"rope_theta": 500.0, **LLAMA3}).rope
    assert new == read(rope_theta=500.0, rope_scaling=LLAMA3).rope
    assert new is not None
    assert (new.theta, new.original_max_position_embeddings) == (500.0, 512)
    assert read(rope_theta=7.0).rope == read(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3, "original_max_position_embeddings": 64},
        {"rope_theta": 1000.0, **YARN},
        {"rope_theta": 1000.0, **YARN, "truncate": False, "beta_fast": 16, "mscale": 0.8, "mscale_all_dim": 0.5},
        {"rope_theta": 1000.0, **YARN, "attention_factor": 1.3},
    ],
)
def test_frequencies_equal_transformers(parameters: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(**LLAMA | {"rope_parameters": dict(parameters), "head_dim": 32})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rope = ModelSpec.from_hf(config).rope
    assert rope is not None
    torch.testing.assert_close(inverse_frequencies(rope, 32), theirs.inv_freq, atol=0, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(theirs.attention_scaling, abs=1e-12)


def test_tokens_dtype_and_multipliers() -> None:
    spec = read(eos_token_id=[2, 5], bos_token_id=1, torch_dtype="bfloat16", embedding_multiplier=3.0)
    assert (spec.eos_token_ids, spec.bos_token_id, spec.checkpoint_dtype) == ((2, 5), 1, "bfloat16")
    assert spec.embedding_multiplier == 1.0  # Granite's, not Llama's
    assert read(dtype=torch.float16, eos_token_id=3).checkpoint_dtype == "float16"
    assert read().eos_token_ids == ()
    granite = read(architectures=["GraniteForCausalLM"], attention_multiplier=0.5, logits_scaling=8.0)
    assert (granite.attention_scale, granite.logits_scaling) == (0.5, 8.0)
    assert spec.attention_scale == 8**-0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ...}, "config has no vocab_size"),
        ({"hidden_size": ...}, "config has no hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) must be divisible by num_key_value_heads \(3\)"),
        ({"hidden_act": "gelu_neu"}, "unknown activation 'gelu_neu', known: relu, .*did you mean 'gelu_new'"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "unknown rope type 'dynamic', known: default, linear"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' needs a factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor < high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "a rope for each layer type"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "only full_attention is supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, "sliding_window=128: .*hf_overrides="),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 64,
                "max_window_layers": 1,
            },
            "sliding_window=64",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized execution is not supported"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        (
            {"architectures": ["OPTForCausalLM"], "ffn_dim": 4, "num_attention_heads": 7},
            r"hidden_size \(64\) divisible",
        ),
        ({"architectures": ["GPT2LMHeadModel"], "add_cross_attention": True}, "add_cross_attention=True"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_a_sliding_window_that_never_slides_is_accepted() -> None:
    qwen = {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 64}
    assert read(**qwen, use_sliding_window=False).architecture == "Qwen3ForCausalLM"
    assert read(**qwen, use_sliding_window=True, max_window_layers=2).num_layers == 2
    assert read(architectures=["MistralForCausalLM"], sliding_window=512).architecture == "MistralForCausalLM"


def test_tensor_parallel_checks() -> None:
    spec = read(num_key_value_heads=4)
    assert [spec.num_kv_heads_per_rank(tp) for tp in (1, 2, 4, 8)] == [4, 2, 1, 1]
    with pytest.raises(
        ValueError, match=r"Total number of attention heads \(8\) must be divisible by tensor parallel size \(3\)\."
    ):
        spec.check_tensor_parallel(3)
    with pytest.raises(ValueError, match=r"key-value heads \(4\) must be divisible by tensor parallel size \(6\)"):
        read(num_attention_heads=12, hidden_size=96, num_key_value_heads=4).check_tensor_parallel(6)
    with pytest.raises(ValueError, match=r"intermediate_size \(97\) must be divisible by tensor parallel size \(2\)"):
        read(intermediate_size=97).check_tensor_parallel(2)
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1, got 0"):
        spec.check_tensor_parallel(0)


def test_spec_travels() -> None:
    spec = read(rope_parameters=LLAMA3)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec.model_class == "shoal.workers.models.llama:LlamaForCausalLM"


def test_spec_and_registry_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, shoal.workers.models.spec, shoal.workers.models.registry\n"
        "print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
