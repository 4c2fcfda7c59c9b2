"""OPT: learned positions, LayerNorm before (most sizes) or after (350m) each branch, projected embeddings (350m)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from shoal.workers.layers.activation import Activation
from shoal.workers.layers.attention import Attention
from shoal.workers.layers.embedding import LearnedPositions, ParallelLMHead, VocabParallelEmbedding
from shoal.workers.layers.linear import ColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from shoal.workers.layers.norm import LayerNorm
from shoal.workers.models.base import Model

if TYPE_CHECKING:
    from shoal.workers.batch import AttentionMetadata, ForwardBatch
    from shoal.workers.models.spec import ModelSpec
    from shoal.workers.parallel import TensorParallel

POSITION_OFFSET = 2  # the first rows of OPT's table were padding ids once


class OPTAttention(torch.nn.Module):
    """Multi-head self-attention."""

    def __init__(self, spec: ModelSpec, layer: int, tp: TensorParallel) -> None:
        super().__init__()
        heads = spec.num_heads
        self.qkv_proj = QKVParallelLinear(spec.hidden_size, spec.head_dim, heads, heads, tp, bias=spec.attention_bias)
        self.out_proj = RowParallelLinear(spec.hidden_size, spec.hidden_size, tp, bias=spec.attention_bias)
        local = heads // tp.world_size
        self.attn = Attention(local, local, spec.head_dim, spec.layer_attention_scale(layer))

    def forward(self, x: torch.Tensor, metadata: AttentionMetadata, kv_cache: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        output: torch.Tensor = self.out_proj(self.attn(*self.qkv_proj.split(self.qkv_proj(x)), metadata, kv_cache))
        return output


class OPTDecoderLayer(torch.nn.Module):
    """Attention and MLP, each with a residual."""

    def __init__(self, spec: ModelSpec, layer: int, tp: TensorParallel) -> None:
        super().__init__()
        self.norm_first = spec.do_layer_norm_before
        affine = spec.layer_norm_elementwise_affine
        self.self_attn = OPTAttention(spec, layer, tp)
        self.self_attn_layer_norm = LayerNorm(spec.hidden_size, spec.norm_eps, affine=affine)
        self.fc1 = ColumnParallelLinear(spec.hidden_size, spec.intermediate_size, tp, bias=spec.mlp_bias)
        self.act = Activation(spec.activation)
        self.fc2 = RowParallelLinear(spec.intermediate_size, spec.hidden_size, tp, bias=spec.mlp_bias)
        self.final_layer_norm = LayerNorm(spec.hidden_size, spec.norm_eps, affine=affine)

    def forward(self, x: torch.Tensor, metadata: AttentionMetadata, kv_cache: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), metadata, kv_cache)
            return x + self._mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, metadata, kv_cache))
        output: torch.Tensor = self.final_layer_norm(x + self._mlp(x))
        return output

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return output


class OPTForCausalLM(Model):
    """OPT, all sizes."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012 (declared ClassVar in Model)
    checkpoint_prefixes = ("model.decoder.", "decoder.")

    def __init__(self, spec: ModelSpec, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        hidden, width = spec.hidden_size, spec.word_embed_proj_dim
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, width, tp)
        self.embed_positions = LearnedPositions(spec.num_positions, hidden, offset=POSITION_OFFSET)
        self.project_in = ReplicatedLinear(width, hidden, bias=False) if width != hidden else None
        self.project_out = ReplicatedLinear(hidden, width, bias=False) if width != hidden else None
        self.layers = torch.nn.ModuleList(OPTDecoderLayer(spec, layer, tp) for layer in range(spec.num_layers))
        affine = spec.layer_norm_elementwise_affine
        self.final_layer_norm = LayerNorm(hidden, spec.norm_eps, affine=affine) if spec.final_layer_norm else None
        tie = self.embed_tokens if spec.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(spec.vocab_size, width, tp, tie=tie)

    def forward(self, batch: ForwardBatch, kv_cache: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Model.forward; with projected embeddings the result has their width."""
        x: torch.Tensor = self.embed_tokens(batch.input_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.embed_positions(batch.positions)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x = layer(x, batch.attention, cache)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)
