"""ModelSpec: the numbers the layers need, read from a Hugging Face config.

The one place with defaults for keys that a config leaves out (those of transformers' config classes). What a config
asks for and Shoal does not compute is refused here. Free of torch and transformers: the driver imports it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.workers.models.registry import MODELS, resolve_architecture

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DEFAULT_MAX_MODEL_LEN = 2048
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of whole heads, neox style. Fields that a type does not use keep their defaults."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: what cos and sin are multiplied by


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model's numbers. Sizes are the whole model's, not a rank's."""

    architecture: str  # a key of MODELS
    model_class: str = ""  # its "module:Class", so that ranks find a family registered in the client's process
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int  # longest prompt + output the model is made for, rope scaling included
    num_positions: int = 0  # rows of the learned position table; 0: rotary
    rope: RopeSpec | None = None
    checkpoint_dtype: str | None = None  # "float32", "float16", "bfloat16", ...
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    norm_eps: float = 1e-6
    activation: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0  # what query · key is multiplied by before softmax
    scale_attn_by_inverse_layer_idx: bool = False  # GPT-2: and divided by layer + 1
    embedding_multiplier: float = 1.0  # Granite
    residual_multiplier: float = 1.0  # Granite
    logits_scaling: float = 1.0  # Granite: logits are divided by it
    word_embed_proj_dim: int = 0  # OPT: width of the token embedding; hidden_size elsewhere
    do_layer_norm_before: bool = True  # OPT
    final_layer_norm: bool = True  # OPT
    layer_norm_elementwise_affine: bool = True  # OPT

    @classmethod
    def from_hf(cls, config: Any) -> ModelSpec:
        """Read any object with a config's attributes (transformers' PretrainedConfig, types.SimpleNamespace).

        ValueError: unknown architecture, a missing number that has no default, or a feature that is not computed.
        """
        model_type = str(_get(config, "model_type") or "")
        architecture = resolve_architecture(_get(config, "architectures"), model_type=model_type)
        if _get(config, "quantization_config"):
            raise ValueError(
                "config.quantization_config: quantized execution is not supported by this version of Shoal"
            )
        if _get(config, "is_encoder_decoder"):
            raise ValueError("config.is_encoder_decoder=True: encoder-decoder models are not supported")
        reader = _READERS.get(architecture, _read_rotary)
        spec = cls(
            architecture=architecture,
            model_class=MODELS[architecture],
            model_type=model_type,
            checkpoint_dtype=_dtype_name(config),
            eos_token_ids=_token_ids(_get(config, "eos_token_id")),
            bos_token_id=_get(config, "bos_token_id"),
            pad_token_id=_get(config, "pad_token_id"),
            **reader(config, architecture),
        )
        spec._check()
        return spec

    def _check(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"config: {name} must be at least 1, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config: num_attention_heads ({self.num_heads}) must be divisible by "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.activation not in ACTIVATIONS:
            near = difflib.get_close_matches(self.activation, ACTIVATIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config: unknown activation {self.activation!r}, known: {', '.join(ACTIVATIONS)}{hint}")
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"config: head_dim must be even for rotary embeddings, got {self.head_dim}")

    def check_tensor_parallel(self, tp: int) -> None:
        """ValueError, with both numbers, where this model cannot be split over `tp` ranks."""
        if tp < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {tp}")
        if self.num_heads % tp:
            raise ValueError(
                f"Total number of attention heads ({self.num_heads}) must be divisible by tensor parallel size ({tp})."
            )
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise ValueError(
                f"Total number of key-value heads ({self.num_kv_heads}) must be divisible by tensor parallel size "
                f"({tp}), or divide it (heads are then replicated)."
            )
        if self.intermediate_size % tp:
            raise ValueError(
                f"intermediate_size ({self.intermediate_size}) must be divisible by tensor parallel size ({tp})."
            )

    def check_pipeline_parallel(self, num_stages: int) -> None:
        """ValueError, with both numbers, where there are more stages than layers."""
        if num_stages < 1:
            raise ValueError(f"pipeline_parallel_size must be at least 1, got {num_stages}")
        if num_stages > self.num_layers:
            raise ValueError(
                f"Total number of layers ({self.num_layers}) must be at least the pipeline parallel size "
                f"({num_stages}): every stage needs a layer."
            )

    def stage_layers(self, stage: int, num_stages: int) -> range:
        """Layers of one pipeline stage. What does not divide goes to the first stages: the last has the head."""
        self.check_pipeline_parallel(num_stages)
        share, extra = divmod(self.num_layers, num_stages)
        first = stage * share + min(stage, extra)
        return range(first, first + share + (stage < extra))

    def num_kv_heads_per_rank(self, tp: int) -> int:
        """KV heads one rank of `tp` keeps; with fewer heads than ranks each rank keeps one, replicated."""
        self.check_tensor_parallel(tp)
        return max(1, self.num_kv_heads // tp)

    def layer_attention_scale(self, layer: int) -> float:
        """The softmax scale of that layer."""
        return self.attention_scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else self.attention_scale


def _read_rotary(config: Any, architecture: str) -> dict[str, Any]:
    """Llama and its relatives: RMSNorm, rotary positions, gated MLP."""
    _refuse_sliding_window(config, architecture)
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    head_dim = _get(config, "head_dim") or (128 if architecture == "Qwen3ForCausalLM" else hidden // heads)
    rope = _read_rope(config)
    granite = architecture == "GraniteForCausalLM"
    return {
        "vocab_size": _number(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": _number(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": _get(config, "num_key_value_heads") or heads,
        "head_dim": head_dim,
        "intermediate_size": _number(config, "intermediate_size"),
        "max_position_embeddings": _max_model_len(config, rope),
        "rope": rope,
        "tie_word_embeddings": bool(_get(config, "tie_word_embeddings", False)),
        "norm_eps": float(_get(config, "rms_norm_eps", 1e-6)),
        "activation": _activation(_get(config, "hidden_act", "silu")),
        "attention_bias": bool(_get(config, "attention_bias", False)) and architecture != "MistralForCausalLM",
        "mlp_bias": bool(_get(config, "mlp_bias", False))
        and architecture not in ("Qwen3ForCausalLM", "MistralForCausalLM"),
        "attention_scale": float(_get(config, "attention_multiplier", 1.0)) if granite else head_dim**-0.5,
        "embedding_multiplier": float(_get(config, "embedding_multiplier", 1.0)) if granite else 1.0,
        "residual_multiplier": float(_get(config, "residual_multiplier", 1.0)) if granite else 1.0,
        "logits_scaling": float(_get(config, "logits_scaling", 1.0)) if granite else 1.0,
        "word_embed_proj_dim": hidden,
    }


def _read_opt(config: Any, architecture: str) -> dict[str, Any]:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    _check_heads_divide(architecture, hidden, heads)
    before = bool(_get(config, "do_layer_norm_before", True))
    return {
        "vocab_size": _number(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": _number(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": _number(config, "ffn_dim", "intermediate_size"),
        "max_position_embeddings": _max_model_len(config, None),
        "num_positions": int(_get(config, "max_position_embeddings", 2048)),
        "tie_word_embeddings": bool(_get(config, "tie_word_embeddings", True)),
        "norm_eps": 1e-5,  # OPT's layers do not read it from the config
        "activation": _activation(_get(config, "activation_function", "relu")),
        "attention_bias": bool(_get(config, "enable_bias", True)),
        "mlp_bias": bool(_get(config, "enable_bias", True)),
        "attention_scale": (hidden // heads) ** -0.5,
        "word_embed_proj_dim": int(_get(config, "word_embed_proj_dim") or hidden),
        "do_layer_norm_before": before,
        "final_layer_norm": before and not _get(config, "_remove_final_layer_norm", False),
        "layer_norm_elementwise_affine": bool(_get(config, "layer_norm_elementwise_affine", True)),
    }


def _read_gpt2(config: Any, architecture: str) -> dict[str, Any]:
    if _get(config, "add_cross_attention"):
        raise ValueError("config.add_cross_attention=True: cross-attention is not supported")
    hidden, heads = _number(config, "hidden_size", "n_embd"), _number(config, "num_attention_heads", "n_head")
    _check_heads_divide(architecture, hidden, heads)
    return {
        "vocab_size": _number(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": _number(config, "num_hidden_layers", "n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": int(_get(config, "n_inner") or 4 * hidden),
        "max_position_embeddings": _max_model_len(config, None, default=1024),
        "num_positions": int(_get(config, "n_positions") or _get(config, "max_position_embeddings") or 1024),
        "tie_word_embeddings": bool(_get(config, "tie_word_embeddings", True)),
        "norm_eps": float(_get(config, "layer_norm_epsilon", 1e-5)),
        "activation": _activation(_get(config, "activation_function", "gelu_new")),
        "attention_bias": True,
        "mlp_bias": True,
        "attention_scale": (hidden // heads) ** -0.5 if _get(config, "scale_attn_weights", True) else 1.0,
        "scale_attn_by_inverse_layer_idx": bool(_get(config, "scale_attn_by_inverse_layer_idx", False)),
        "word_embed_proj_dim": hidden,
    }


_READERS: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "OPTForCausalLM": _read_opt,
    "GPT2LMHeadModel": _read_gpt2,
}


def _read_rope(config: Any) -> RopeSpec:
    """`rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` of older configs."""
    parameters: Mapping[str, Any] = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError(f"config.rope_parameters: a rope for each layer type is not supported, got {parameters}")
    partial = parameters.get("partial_rotary_factor", _get(config, "partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"config: partial_rotary_factor={partial} is not supported, only whole heads are rotated")
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"config: unknown rope type {rope_type!r}, known: {', '.join(ROPE_TYPES)}")
    theta = float(parameters.get("rope_theta") or _get(config, "rope_theta", 10000.0))
    if rope_type == "default":
        return RopeSpec(theta=theta)
    if (factor := parameters.get("factor")) is None:
        raise ValueError(f"config: rope type {rope_type!r} needs a factor, got {dict(parameters)}")
    if rope_type == "linear":
        return RopeSpec("linear", theta, float(factor))
    original = _get(config, "original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    original = int(original or _number(config, "max_position_embeddings"))
    if rope_type == "yarn":
        return _read_yarn(parameters, theta, float(factor), original)
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if low is None or high is None or low >= high:
        raise ValueError(f"config: rope type 'llama3' needs low_freq_factor < high_freq_factor, got {low} and {high}")
    return RopeSpec("llama3", theta, float(factor), original, float(low), float(high))


def _read_yarn(parameters: Mapping[str, Any], theta: float, factor: float, original: int) -> RopeSpec:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)
    return RopeSpec(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(attention_factor),
    )


def _max_model_len(config: Any, rope: RopeSpec | None, default: int = DEFAULT_MAX_MODEL_LEN) -> int:
    """The smallest of the lengths a config states, stretched by rope scaling. llama3 configs state the final length."""
    lengths = [int(value) for key in _LENGTH_KEYS if (value := _get(config, key)) is not None]
    length = min(lengths, default=default)
    if rope is not None and rope.rope_type == "yarn":
        length = rope.original_max_position_embeddings
    if rope is not None and rope.rope_type in ("yarn", "linear"):
        length = int(length * rope.factor)
    if length < 1:
        raise ValueError(f"config: the model's length must be at least 1, got {length}")
    return length


def _refuse_sliding_window(config: Any, architecture: str) -> None:
    if any(kind != "full_attention" for kind in _get(config, "layer_types") or ()):
        kinds = sorted(set(_get(config, "layer_types")))
        raise ValueError(f"config.layer_types: only full_attention is supported, got {kinds}")
    window = _get(config, "sliding_window")
    in_use = bool(_get(config, "use_sliding_window", architecture == "MistralForCausalLM"))
    first_layer = _get(config, "max_window_layers", 0) if architecture == "Qwen3ForCausalLM" else 0
    if window is None or not in_use or first_layer >= _number(config, "num_hidden_layers"):
        return
    if window < _number(config, "max_position_embeddings"):
        raise ValueError(
            f"config.sliding_window={window}: sliding window attention is not supported; to run the model on contexts "
            f"within the window, pass hf_overrides={{'sliding_window': None, 'max_position_embeddings': {window}}}"
        )


def _check_heads_divide(architecture: str, hidden: int, heads: int) -> None:
    if hidden % heads:
        raise ValueError(f"config: {architecture} needs hidden_size ({hidden}) divisible by its heads ({heads})")


def _get(config: Any, key: str, default: Any = None) -> Any:
    value = getattr(config, key, None)
    return default if value is None else value


def _number(config: Any, *keys: str) -> int:
    for key in keys:
        if (value := _get(config, key)) is not None:
            return int(value)
    raise ValueError(f"config has no {' or '.join(keys)}, which the model cannot be built without")


def _activation(name: str) -> str:
    return {"swish": "silu"}.get(name, name)


def _dtype_name(config: Any) -> str | None:
    dtype = _get(config, "dtype") or _get(config, "torch_dtype")
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(item) for item in value)
