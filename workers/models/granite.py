"""Granite: Llama with four multipliers, of embeddings, attention scores, residual branches and logits."""

from __future__ import annotations

import torch

from shoal.workers.models.decoder import DecoderModel


class GraniteForCausalLM(DecoderModel):
    """The embedding, attention and residual multipliers are ModelSpec numbers that the shared blocks apply."""

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Model.local_logits; divided by logits_scaling."""
        return super().local_logits(hidden) / self.spec.logits_scaling
