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
from shoal.workers.pipeline import WHOLE, Stage

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

    def __init__(self, spec: ModelSpec, tp: TensorParallel, stage: Stage = WHOLE) -> None:
        super().__init__(spec, tp, stage)
        hidden, width = spec.hidden_size, spec.word_embed_proj_dim
        self.embed_tokens = self.held(self.needs_embedding, lambda: VocabParallelEmbedding(spec.vocab_size, width, tp))
        self.embed_positions = self.held(
            stage.first, lambda: LearnedPositions(spec.num_positions, hidden, offset=POSITION_OFFSET)
        )
        self.project_in = self.project_out = None
        if width != hidden:
            self.project_in = self.held(stage.first, lambda: ReplicatedLinear(width, hidden, bias=False))
            self.project_out = self.held(stage.last, lambda: ReplicatedLinear(hidden, width, bias=False))
        self.layers = self.layer_list(lambda layer: OPTDecoderLayer(spec, layer, tp))
        affine, self.final_layer_norm = spec.layer_norm_elementwise_affine, None
        if spec.final_layer_norm:
            self.final_layer_norm = self.held(stage.last, lambda: LayerNorm(hidden, spec.norm_eps, affine=affine))
        tie = self.embed_tokens if spec.tie_word_embeddings else None
        self.lm_head = self.held(stage.last, lambda: ParallelLMHead(spec.vocab_size, width, tp, tie=tie))

    def forward(self, batch: ForwardBatch, kv_cache: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Model.forward; with projected embeddings the result has their width."""
        x = self._embed(batch) if batch.hidden is None else batch.hidden
        for layer, cache in self.own(self.layers, kv_cache):
            x = layer(x, batch.attention, cache)
        output: torch.Tensor = batch.pick(x)
        if self.stage.last and self.final_layer_norm is not None:
            output = self.final_layer_norm(output)
        if self.stage.last and self.project_out is not None:
            output = self.project_out(output)
        return output

    def _embed(self, batch: ForwardBatch) -> torch.Tensor:
        x: torch.Tensor = self.embed_tokens(batch.input_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        positions: torch.Tensor = self.embed_positions(batch.positions)
        return x + positions
