"""The blocks that Llama and its relatives share: rotary attention, gated MLP, pre-norm layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from shoal.kernels.ops.decode_attention import decode_attention
from shoal.kernels.ops.qk_norm_rope_store import qk_norm_rope_store
from shoal.workers.layers.attention import Attention
from shoal.workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from shoal.workers.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from shoal.workers.layers.norm import RMSNorm
from shoal.workers.layers.rotary import RotaryEmbedding
from shoal.workers.models.base import Model
from shoal.workers.pipeline import WHOLE, Stage

if TYPE_CHECKING:
    from shoal.workers.batch import ForwardBatch
    from shoal.workers.models.spec import ModelSpec
    from shoal.workers.overlap import Overlap
    from shoal.workers.parallel import TensorParallel

Rotation = tuple[torch.Tensor, torch.Tensor]  # table of cosines and sines, positions of the pass's tokens


class RotaryAttention(torch.nn.Module):
    """Self-attention with rotary positions. Families that normalize heads set `q_norm` and `k_norm`."""

    def __init__(self, spec: ModelSpec, layer: int, tp: TensorParallel) -> None:
        super().__init__()
        self.num_heads = spec.num_heads // tp.world_size
        self.num_kv_heads = spec.num_kv_heads_per_rank(tp.world_size)
        self.head_dim = spec.head_dim
        self.qkv_proj = QKVParallelLinear(
            spec.hidden_size, spec.head_dim, spec.num_heads, spec.num_kv_heads, tp, bias=spec.attention_bias
        )
        self.o_proj = RowParallelLinear(spec.num_heads * spec.head_dim, spec.hidden_size, tp, bias=spec.attention_bias)
        self.norm_eps = spec.norm_eps
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.attn = Attention(self.num_heads, self.num_kv_heads, spec.head_dim, spec.layer_attention_scale(layer))

    def forward(
        self, x: torch.Tensor, rotation: Rotation, batch: ForwardBatch, kv_cache: torch.Tensor, pick: bool = False
    ) -> torch.Tensor:
        """[T, hidden] -> [T, this rank's heads * head_dim], what o_proj takes; `pick`: only of tokens that are wanted.

        Keys and values of all tokens go into the cache.
        """
        metadata = batch.attention
        qkv = self.qkv_proj(x)
        norms = (
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.norm_eps,
        )
        table, positions = rotation
        if metadata.rows_decode_apart:
            lengths, tables, longest = metadata.seq_lens, metadata.block_tables, metadata.max_seq_len
            output = decode_attention(
                qkv, *norms, table, kv_cache[0], kv_cache[1], lengths, tables, self.attn.scale, longest, self.num_heads
            )
            return output.view(len(qkv), -1)
        slots = metadata.slot_mapping
        cache = kv_cache[0], kv_cache[1]
        query, key, value = qk_norm_rope_store(qkv, *norms, table, positions, *cache, slots, self.num_heads)
        if pick and batch.sampling_rows is not None:
            # In this order: attention looks at lengths and tables while the kernel before it still runs.
            metadata = metadata.of_last_tokens(batch.sampling_rows)
            return self.attn.attend(query[batch.sampling_tokens], metadata, kv_cache)
        return self.attn.attend(query, metadata, kv_cache, key, value)


class GatedMLP(torch.nn.Module):
    """act(gate(x)) * up(x), and the down projection of it."""

    def __init__(self, spec: ModelSpec, tp: TensorParallel) -> None:
        super().__init__()
        size = spec.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(spec.hidden_size, [size, size], tp, bias=spec.mlp_bias)
        self.activation = spec.activation
        self.down_proj = RowParallelLinear(size, spec.hidden_size, tp, bias=spec.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, this rank's intermediates], what down_proj takes."""
        return self.gate_up_proj.gated(x, self.activation)


class DecoderLayer(torch.nn.Module):
    """Pre-norm layer. The residual travels beside x: the linear that ends a block, the sum over ranks, the addition and
    the norm that begins the next block are one step, RowParallelLinear.add_norm."""

    attention_class: ClassVar[type[RotaryAttention]] = RotaryAttention

    def __init__(self, spec: ModelSpec, layer: int, tp: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = self.attention_class(spec, layer, tp)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(spec, tp)
        self.residual_multiplier = spec.residual_multiplier

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        rotation: Rotation,
        batch: ForwardBatch,
        kv_cache: torch.Tensor,
        next_norm: RMSNorm | None,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_layernorm of the residual, the residual) -> (next_norm of the new residual, the new residual).

        All [T, hidden]; without a next_norm the first result is the residual itself. After the `last` layer nothing
        asks for tokens that do not sample: it gives their keys and values to the cache and leaves them out.
        """
        x, residual = self.attend(x, residual, rotation, batch, kv_cache, last)
        return self.feed(x, residual, next_norm)

    def attend(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        rotation: Rotation,
        batch: ForwardBatch,
        kv_cache: torch.Tensor,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first block of `forward`: (post_attention_layernorm of the new residual, the new residual)."""
        heads = self.self_attn(x, rotation, batch, kv_cache, pick=last)
        if last:
            residual = batch.pick(residual)
        norm, scale = self.post_attention_layernorm, self.residual_multiplier
        return self.self_attn.o_proj.add_norm(heads, residual, norm, scale)

    def feed(
        self, x: torch.Tensor, residual: torch.Tensor, next_norm: RMSNorm | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The second block."""
        return self.mlp.down_proj.add_norm(self.mlp(x), residual, next_norm, self.residual_multiplier)


class DecoderModel(Model):
    """Embedding, layers, norm, head. A family names its layer class and its packed modules."""

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    packed_modules_mapping = {  # noqa: RUF012 (declared ClassVar in Model)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    checkpoint_prefixes = ("model.",)
    ignored_weights = (r"rotary_emb\.inv_freq$",)

    def __init__(self, spec: ModelSpec, tp: TensorParallel, stage: Stage = WHOLE) -> None:
        super().__init__(spec, tp, stage)
        assert spec.rope is not None
        self.embed_tokens = self.held(
            self.needs_embedding, lambda: VocabParallelEmbedding(spec.vocab_size, spec.hidden_size, tp)
        )
        self.rotary_emb = RotaryEmbedding(spec.rope, spec.head_dim, spec.max_position_embeddings)
        self.layers = self.layer_list(lambda layer: self.layer_class(spec, layer, tp))
        self.norm = self.held(stage.last, lambda: RMSNorm(spec.hidden_size, spec.norm_eps))
        tie = self.embed_tokens if spec.tie_word_embeddings else None
        self.lm_head = self.held(stage.last, lambda: ParallelLMHead(spec.vocab_size, spec.hidden_size, tp, tie=tie))

    def forward(self, batch: ForwardBatch, kv_cache: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Model.forward."""
        own = list(self.own(self.layers, kv_cache))
        norms = [layer.input_layernorm for layer, _ in own] + [self.norm if self.stage.last else None]
        x = self._embed(batch.input_ids) if batch.hidden is None else batch.hidden
        if batch.halves is not None and self.tp.peers is not None and self.tp.peers.overlap is not None:
            return self._forward_halves(x, batch.halves, own, norms, self.tp.peers.overlap)
        rotation = (self.rotary_emb.cos_sin, batch.positions)
        x, residual = norms[0](x), x
        for index, (layer, cache) in enumerate(own):
            last = self.stage.last and index == len(own) - 1
            x, residual = layer(x, residual, rotation, batch, cache, norms[index + 1], last)
        output: torch.Tensor = x
        return output

    def _forward_halves(
        self, x: torch.Tensor, halves: Sequence[ForwardBatch], own: list[Any], norms: list[Any], overlap: Overlap
    ) -> torch.Tensor:
        """The layers over both halves in turn: while one computes, the other's sum over the ranks travels."""
        sizes = [len(half.input_ids) for half in halves]
        firsts = [0, sizes[0]]
        streams = [(norms[0](part), part) for part in x.split(sizes)]
        rotations = [(self.rotary_emb.cos_sin, half.positions) for half in halves]
        for (layer, cache), next_norm in zip(own, norms[1:], strict=True):
            for i, half in enumerate(halves):
                with overlap.half(firsts[i]):
                    streams[i] = layer.attend(*streams[i], rotations[i], half, cache)
            for i in range(len(halves)):
                with overlap.half(firsts[i]):
                    streams[i] = layer.feed(*streams[i], next_norm)
        overlap.finish()
        return overlap.results(len(x))

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed_tokens(input_ids)
        return x if self.spec.embedding_multiplier == 1.0 else x * self.spec.embedding_multiplier
