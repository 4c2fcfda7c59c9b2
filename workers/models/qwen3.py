"""Qwen3 (dense): Llama whose queries and keys are normalized head by head before rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.workers.layers.norm import RMSNorm
from shoal.workers.models.decoder import DecoderLayer, DecoderModel, RotaryAttention

if TYPE_CHECKING:
    from shoal.workers.models.spec import ModelSpec
    from shoal.workers.parallel import TensorParallel


class Qwen3Attention(RotaryAttention):
    """One RMSNorm for all query heads, one for all key heads."""

    def __init__(self, spec: ModelSpec, layer: int, tp: TensorParallel) -> None:
        super().__init__(spec, layer, tp)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps)
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps)


class Qwen3DecoderLayer(DecoderLayer):
    """Its attention is Qwen3Attention."""

    attention_class = Qwen3Attention


class Qwen3ForCausalLM(DecoderModel):
    """Qwen3 causal language model."""

    layer_class = Qwen3DecoderLayer
