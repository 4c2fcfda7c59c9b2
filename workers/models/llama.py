"""Llama 1 to 3, SmolLM2, and what shares their blocks (Mistral without sliding window)."""

from __future__ import annotations

from shoal.workers.models.decoder import DecoderModel


class LlamaForCausalLM(DecoderModel):
    """Grouped-query attention with rotary positions, RMSNorm, gated MLP."""
