"""Every family against transformers in float32: paged KV, chunked prefill, packed rows, tensor parallelism, loading."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

from shoal.workers.batch import AttentionMetadata, ForwardBatch
from shoal.workers.models.registry import load_model_class
from shoal.workers.models.spec import ModelSpec
from shoal.workers.parallel import TensorParallel

BLOCK_SIZE = 4
COMMON = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **COMMON,
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT = {
    **COMMON,
    "hidden_size": 48,
    "ffn_dim": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {**COMMON, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 7.0,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "llama-llama3-bias": (
        "Llama",
        {**LLAMA, "rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    ),
    "llama-linear": (
        "Llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
    ),
    "llama-yarn": ("Llama", {**LLAMA, "rope_parameters": YARN_ROPE, "num_key_value_heads": 6}),
    "llama-gelu": ("Llama", {**LLAMA, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": None}),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 12, "tie_word_embeddings": True}),
    "granite": ("Granite", {**LLAMA, **GRANITE, "tie_word_embeddings": True}),
    "granite-bias": ("Granite", {**LLAMA, **GRANITE, "attention_bias": True, "mlp_bias": True}),
    "opt": ("OPT", OPT),
    "opt-post-norm": ("OPT", {**OPT, "do_layer_norm_before": False}),
    "opt-350m": ("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-plain": (
        "OPT",
        {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True},
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2-gelu": ("GPT2", {**GPT2, "activation_function": "gelu", "n_inner": 100}),
    "gpt2-scaled": ("GPT2", {**GPT2, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    "gpt2-unscaled": ("GPT2", {**GPT2, "scale_attn_weights": False}),
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
PROMPT_LENGTHS = (14, 2, 23, 8)
# Query tokens of each row in each pass: chunked prefill, whole prompts, decoding and idle rows side by side; in the end
# every row decodes, as graphs have it.
SCHEDULE = ((5, 1, 8, 7), (1, 0, 8, 0), (6, 0, 1, 0), (1, 0, 4, 0), (0, 0, 1, 0), (1, 1, 1, 1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@dataclass
class Source:
    """A checkpoint's tensor in memory that notes how many values were read."""

    name: str
    tensor: torch.Tensor
    read: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def load(self) -> torch.Tensor:
        self.read.append(self.tensor.numel())
        return self.tensor.clone()

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        part = self.tensor.narrow(dim, start, length).clone()
        self.read.append(part.numel())
        return part


class ThreadRank(TensorParallel):
    """A rank whose group are threads of this process."""

    def __init__(self, rank: int, world_size: int, desk: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, world_size)
        self.desk, self.barrier = desk, barrier

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.desk[self.rank] = tensor.clone()
        self.barrier.wait(timeout=60)
        tensors = list(self.desk)
        self.barrier.wait(timeout=60)
        return tensors

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(tensor), dim)


def reference_model(variant: str) -> transformers.PreTrainedModel:
    family, arguments = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**arguments)
    name = CLASSES.get(family, f"{family}ForCausalLM")
    config.architectures = [name]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():  # large enough that every part of the model shows in the logits
        base = 1.0 if parameter.dim() == 1 and parameter.min() == 1 else 0.0
        parameter.copy_(base + 0.2 * torch.randn_like(parameter))
    return model


def sources_of(model: transformers.PreTrainedModel) -> list[Source]:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return [Source(name, tensor) for name, tensor in state.items()]


def build(spec: ModelSpec, tp: TensorParallel, sources: Iterable[Source]) -> Any:
    model = load_model_class(spec.architecture)(spec, tp)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.load_weights(sources)
    return model


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, COMMON["vocab_size"], (length,), generator=generator) for length in PROMPT_LENGTHS]


def run(model: Any, spec: ModelSpec, tp: TensorParallel) -> list[torch.Tensor]:
    """Logits of every token of every prompt, [length, vocab] each, from passes as SCHEDULE says."""
    token_ids = prompts()
    generator = torch.Generator().manual_seed(2)
    width = max(PROMPT_LENGTHS) // BLOCK_SIZE + 2
    num_blocks = len(token_ids) * width
    tables = torch.randperm(num_blocks, generator=generator).view(len(token_ids), width)
    shape = (2, num_blocks, BLOCK_SIZE, spec.num_kv_heads_per_rank(tp.world_size), spec.head_dim)
    kv_cache = [torch.full(shape, float("nan")) for _ in range(spec.num_layers)]
    done = [0] * len(token_ids)
    logits: list[list[torch.Tensor]] = [[] for _ in token_ids]
    for counts in SCHEDULE:
        rows = [row for row, count in enumerate(counts) if count]
        spans = [torch.arange(done[row], done[row] + counts[row]) for row in rows]
        slots = [tables[row][s // BLOCK_SIZE] * BLOCK_SIZE + s % BLOCK_SIZE for row, s in zip(rows, spans, strict=True)]
        garbage = tables[rows].to(torch.int32)
        for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
            done[row] += len(span)
            garbage[index, -(-done[row] // BLOCK_SIZE) :] = 2**31 - 1 - row  # what a row does not need is undefined
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *(len(s) for s in spans)]).cumsum(0).to(torch.int32),
            seq_lens=torch.tensor([done[row] for row in rows], dtype=torch.int32),
            block_tables=garbage,
            slot_mapping=torch.cat(slots),
            block_size=BLOCK_SIZE,
            max_query_len=max(counts),
            max_seq_len=max(done),
            rows_decode_apart=max(counts) == 1,
        )
        ids = torch.cat([token_ids[row][span] for row, span in zip(rows, spans, strict=True)])
        hidden = model(ForwardBatch(ids, torch.cat(spans), metadata), kv_cache)
        out = model.compute_logits(hidden)
        for row, part in zip(rows, out.split([len(s) for s in spans]), strict=True):
            logits[row].append(part)
    assert done == list(PROMPT_LENGTHS)
    return [torch.cat(parts) for parts in logits]


def run_parallel(spec: ModelSpec, sources: list[Source], world_size: int) -> list[list[torch.Tensor]]:
    """Each rank's logits."""
    desk: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size)
    results: list[Any] = [None] * world_size

    def rank_main(rank: int) -> None:
        tp = ThreadRank(rank, world_size, desk, barrier)
        try:
            with torch.inference_mode():
                results[rank] = run(build(spec, tp, sources), spec, tp)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str) -> None:
    reference = reference_model(variant)
    spec = ModelSpec.from_hf(reference.config)
    tp = TensorParallel()
    ours = run(build(spec, tp, sources_of(reference)), spec, tp)
    for ids, logits in zip(prompts(), ours, strict=True):
        expected = reference(ids.unsqueeze(0)).logits[0]
        assert logits.shape == expected.shape
        assert expected.std() > 0.05  # the comparison would see a difference
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("variant", "world_size"),
    # llama on 6 ranks: more ranks than KV heads, and ranks beyond the end of the vocabulary
    [
        ("llama-llama3-bias", 2),
        ("llama", 6),
        ("qwen3", 2),
        ("granite-bias", 2),
        ("opt-350m", 2),
        ("gpt2", 2),
        ("gpt2", 4),
    ],
)
def test_tensor_parallel_equals_one_rank(variant: str, world_size: int) -> None:
    reference = reference_model(variant)
    spec = ModelSpec.from_hf(reference.config)
    tp = TensorParallel()
    expected = run(build(spec, tp, sources_of(reference)), spec, tp)
    for rank_logits in run_parallel(spec, sources_of(reference), world_size):
        for logits, one in zip(rank_logits, expected, strict=True):
            torch.testing.assert_close(logits, one, atol=2e-5, rtol=2e-5)
