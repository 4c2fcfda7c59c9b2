"""GPT-2 and Cerebras-GPT: learned positions, fused QKV; checkpoints store linear weights as [in, out] (Conv1D)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from shoal.workers.layers.activation import Activation
from shoal.workers.layers.attention import Attention
from shoal.workers.layers.embedding import LearnedPositions, ParallelLMHead, VocabParallelEmbedding
from shoal.workers.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from shoal.workers.layers.norm import LayerNorm
from shoal.workers.models.base import Model
from shoal.workers.pipeline import WHOLE, Stage

if TYPE_CHECKING:
    from shoal.workers.batch import AttentionMetadata, ForwardBatch
    from shoal.workers.models.spec import ModelSpec
    from shoal.workers.parallel import TensorParallel


class GPT2Attention(torch.nn.Module):
    """Multi-head self-attention."""

    def __init__(self, spec: ModelSpec, layer: int, tp: TensorParallel) -> None:
        super().__init__()
        hidden, heads = spec.hidden_size, spec.num_heads
        self.c_attn = QKVParallelLinear(hidden, spec.head_dim, heads, heads, tp, bias=True, transposed=True)
        self.c_proj = RowParallelLinear(hidden, hidden, tp, bias=True, transposed=True)
        local = heads // tp.world_size
        self.attn = Attention(local, local, spec.head_dim, spec.layer_attention_scale(layer))

    def forward(self, x: torch.Tensor, metadata: AttentionMetadata, kv_cache: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        output: torch.Tensor = self.c_proj(self.attn(*self.c_attn.split(self.c_attn(x)), metadata, kv_cache))
        return output


class GPT2MLP(torch.nn.Module):
    """c_proj(act(c_fc(x)))."""

    def __init__(self, spec: ModelSpec, tp: TensorParallel) -> None:
        super().__init__()
        hidden, size = spec.hidden_size, spec.intermediate_size
        self.c_fc = ColumnParallelLinear(hidden, size, tp, bias=True, transposed=True)
        self.act = Activation(spec.activation)
        self.c_proj = RowParallelLinear(size, hidden, tp, bias=True, transposed=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        output: torch.Tensor = self.c_proj(self.act(self.c_fc(x)))
        return output


class GPT2Block(torch.nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, spec: ModelSpec, layer: int, tp: TensorParallel) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(spec.hidden_size, spec.norm_eps)
        self.attn = GPT2Attention(spec, layer, tp)
        self.ln_2 = LayerNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GPT2MLP(spec, tp)

    def forward(self, x: torch.Tensor, metadata: AttentionMetadata, kv_cache: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        x = x + self.attn(self.ln_1(x), metadata, kv_cache)
        output: torch.Tensor = x + self.mlp(self.ln_2(x))
        return output


class GPT2LMHeadModel(Model):
    """GPT-2 language model."""

    checkpoint_prefixes = ("transformer.",)
    ignored_weights = (r"\.attn\.(masked_)?bias$",)  # causal mask buffers
    embedding_name = "wte.weight"

    def __init__(self, spec: ModelSpec, tp: TensorParallel, stage: Stage = WHOLE) -> None:
        super().__init__(spec, tp, stage)
        hidden = spec.hidden_size
        self.wte = self.held(self.needs_embedding, lambda: VocabParallelEmbedding(spec.vocab_size, hidden, tp))
        self.wpe = self.held(stage.first, lambda: LearnedPositions(spec.num_positions, hidden))
        self.h = self.layer_list(lambda layer: GPT2Block(spec, layer, tp))
        self.ln_f = self.held(stage.last, lambda: LayerNorm(hidden, spec.norm_eps))
        tie = self.wte if spec.tie_word_embeddings else None
        self.lm_head = self.held(stage.last, lambda: ParallelLMHead(spec.vocab_size, hidden, tp, tie=tie))

    def forward(self, batch: ForwardBatch, kv_cache: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Model.forward."""
        x = self.wte(batch.input_ids) + self.wpe(batch.positions) if batch.hidden is None else batch.hidden
        for layer, cache in self.own(self.h, kv_cache):
            x = layer(x, batch.attention, cache)
        output: torch.Tensor = self.ln_f(batch.pick(x)) if self.stage.last else x
        return output
