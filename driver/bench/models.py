"""Models to measure by name: their configs, without weights or tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shoal.workers.models.spec import ModelSpec

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    # Small enough for a CPU; its vocabulary holds the ids that the workloads draw.
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": 10240,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
}


def model_spec(name: str) -> ModelSpec:
    """The numbers of the config of that name."""
    return ModelSpec.from_hf(SimpleNamespace(**CONFIGS[name]))


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """What to give an engine as its model: a temporary folder with the config of that name, else `name` itself (a
    folder, a .gguf file, a hub id). An existing path of that name wins."""
    if name not in CONFIGS or Path(name).exists():
        yield name
        return
    with tempfile.TemporaryDirectory(prefix=f"shoal-{name}-") as folder:
        # Some engines read the end-of-sequence id even where it is ignored.
        config = CONFIGS[name] | {"bos_token_id": 0, "eos_token_id": 1}
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))
        yield folder
