"""The config of a model that is one .gguf file, from its metadata."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.workers.loading.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """What config.json would say for this file: model_type, architectures and every number the model needs.

    Raises ValueError, naming the file, for an architecture that is not known here or a number that is missing.
    """
    builder = _BUILDERS.get(file.architecture)
    if builder is None:
        raise ValueError(
            f"{file.path}: GGUF architecture {file.architecture!r} is not supported, only {sorted(_BUILDERS)}"
        )
    config = builder(_Fields(file))
    tokens = file.tensors.get("token_embd.weight")
    if tokens is None:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight'")
    config["vocab_size"] = tokens.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding"), ("eos_token_id", "eos")):
        config[name] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    end_of_turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != config["eos_token_id"]:
        # Chat models of the Llama 3 kind end a turn with another token than a text.
        config["eos_token_id"] = [i for i in (config["eos_token_id"], end_of_turn) if i is not None]
    return config


class _Fields:
    """Metadata under the architecture's own prefix."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.integer = file.integer

    def has_tensor(self, name: str) -> bool:
        return name in self.file.tensors

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
        value = float(self.file.value(key, default))
        return next((short for n in range(6, 10) if _float32(short := float(f"{value:.{n}g}")) == value), value)

    def text(self, key: str, default: str) -> str:
        return str(self.file.value(key, default))


def _llama_like(fields: _Fields, model_type: str, architecture: str) -> dict[str, Any]:
    """Numbers that the Llama family shares."""
    if fields.integer("expert_count", 0):
        raise ValueError(f"{fields.file.path} is a mixture of experts, which is not supported for {model_type}")
    heads = fields.integer("attention.head_count")
    rotary = fields.integer("rope.dimension_count", 0)
    head_dim = fields.integer("attention.key_length", rotary or fields.integer("embedding_length") // heads)
    if rotary not in (0, head_dim):
        raise ValueError(f"{fields.file.path}: rotary embedding of {rotary} of {head_dim} dimensions is not supported")
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": fields.integer("embedding_length"),
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_parameters": _rope(fields, head_dim),
        "attention_bias": fields.has_tensor("blk.0.attn_q.bias"),
    }


def _llama(fields: _Fields) -> dict[str, Any]:
    config = _llama_like(fields, "llama", "LlamaForCausalLM")
    return {**config, "mlp_bias": fields.has_tensor("blk.0.ffn_gate.bias")}


def _qwen3(fields: _Fields) -> dict[str, Any]:
    return _llama_like(fields, "qwen3", "Qwen3ForCausalLM")


def _granite(fields: _Fields) -> dict[str, Any]:
    config = _llama_like(fields, "granite", "GraniteForCausalLM")
    return {
        **config,
        "mlp_bias": fields.has_tensor("blk.0.ffn_gate.bias"),
        "embedding_multiplier": fields.number("embedding_scale", 1.0),
        # Without one llama.cpp scales as usual, and so does a checkpoint that was converted without one.
        "attention_multiplier": fields.number("attention.scale", config["head_dim"] ** -0.5),
        "residual_multiplier": fields.number("residual_scale", 1.0),
        "logits_scaling": fields.number("logit_scale", 1.0),
    }


def _gpt2(fields: _Fields) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": fields.integer("embedding_length"),
        "n_inner": fields.integer("feed_forward_length", 4 * fields.integer("embedding_length")),
        "n_layer": fields.integer("block_count"),
        "n_head": fields.integer("attention.head_count"),
        "n_positions": fields.integer("context_length"),
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",  # llama.cpp's only GELU; the file does not say
    }


_BUILDERS: dict[str, Callable[[_Fields], dict[str, Any]]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "granite": _granite,
    "gpt2": _gpt2,
}


def _rope(fields: _Fields, head_dim: int) -> dict[str, Any]:
    """rope_parameters, as transformers names them."""
    theta = fields.number("rope.freq_base", 10000.0)
    if fields.has_tensor(ROPE_FACTORS):
        return _llama3_rope(fields.file, theta, head_dim)
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{fields.file.path}: rope.scaling.type {kind!r} is not supported, only none, linear, yarn")
    rope = {"rope_type": kind, "rope_theta": theta, "factor": fields.number("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = fields.integer("rope.scaling.original_context_length")
    return rope


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling is stored as one divisor per frequency: find the parameters that give exactly these."""
    tensor = file.tensors[ROPE_FACTORS]
    with file.path.open("rb") as data:
        data.seek(tensor.offset)
        stored = struct.unpack(f"<{tensor.shape[0]}f", data.read(4 * tensor.shape[0]))
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": max(stored),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = [_llama3_factor(2 * math.pi * theta ** (2 * i / head_dim), rope) for i in range(head_dim // 2)]
    if len(stored) != len(expected) or not all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(stored, expected, strict=True)
    ):
        raise ValueError(f"{file.path}: the frequency factors in {ROPE_FACTORS!r} are not Llama 3's; not supported")
    return rope


def _llama3_factor(wavelength: float, rope: dict[str, Any]) -> float:
    """What divides the frequency of this wavelength."""
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    if wavelength < length / high:
        return 1.0
    if wavelength > length / low:
        return float(rope["factor"])
    smooth = (length / wavelength - low) / (high - low)
    return float(1 / ((1 - smooth) / rope["factor"] + smooth))


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
