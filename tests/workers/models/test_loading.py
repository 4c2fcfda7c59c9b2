"""How models find their weights in a checkpoint: names, parts, mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.workers.models.registry import load_model_class
from shoal.workers.models.spec import ModelSpec
from shoal.workers.parallel import TensorParallel

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 70,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 70,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 8,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 70,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
}
LLAMA_SHAPES = {
    "model.embed_tokens.weight": (70, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.layers.0.mlp.gate_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.norm.weight": (16,),
    "lm_head.weight": (70, 16),
}
GPT2_SHAPES = {
    "transformer.wte.weight": (70, 16),
    "transformer.wpe.weight": (8, 16),
    "transformer.h.0.ln_1.weight": (16,),
    "transformer.h.0.ln_1.bias": (16,),
    "transformer.h.0.attn.c_attn.weight": (16, 48),
    "transformer.h.0.attn.c_attn.bias": (48,),
    "transformer.h.0.attn.c_proj.weight": (16, 16),
    "transformer.h.0.attn.c_proj.bias": (16,),
    "transformer.h.0.ln_2.weight": (16,),
    "transformer.h.0.ln_2.bias": (16,),
    "transformer.h.0.mlp.c_fc.weight": (16, 64),
    "transformer.h.0.mlp.c_fc.bias": (64,),
    "transformer.h.0.mlp.c_proj.weight": (64, 16),
    "transformer.h.0.mlp.c_proj.bias": (16,),
    "transformer.ln_f.weight": (16,),
    "transformer.ln_f.bias": (16,),
}
OPT_SHAPES = {
    "model.decoder.embed_tokens.weight": (70, 16),
    "model.decoder.embed_positions.weight": (10, 16),
    "model.decoder.final_layer_norm.weight": (16,),
    "model.decoder.final_layer_norm.bias": (16,),
    **{
        f"model.decoder.layers.0.{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in {
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (16, 16),
            "self_attn.v_proj": (16, 16),
            "self_attn.out_proj": (16, 16),
            "self_attn_layer_norm": (16,),
            "fc1": (24, 16),
            "fc2": (16, 24),
            "final_layer_norm": (16,),
        }.items()
        for kind in ("weight", "bias")
    },
}


@dataclass
class Source:
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
        self.read.append(self.tensor.numel() // self.tensor.shape[dim] * length)
        return self.tensor.narrow(dim, start, length).clone()


def make_sources(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Source]:
    generator = torch.Generator().manual_seed(0)
    return {name: Source(name, torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def build(config: dict[str, Any], tp: TensorParallel | None = None, **changes: Any) -> Any:
    spec = ModelSpec.from_hf(SimpleNamespace(**config | changes))
    model = load_model_class(spec.architecture)(spec, tp or TensorParallel())
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def loaded(model: Any, sources: Any) -> dict[str, torch.Tensor]:
    model.load_weights(sources.values() if isinstance(sources, dict) else sources)
    return dict(model.named_parameters())


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_every_parameter_is_filled_and_fused_parts_stand_in_order() -> None:
    sources = make_sources(LLAMA_SHAPES)
    parameters = loaded(build(LLAMA), sources)
    assert not any(p.isnan().any() for p in parameters.values())
    fused = [sources[f"model.layers.0.self_attn.{part}_proj.weight"].tensor for part in "qkv"]
    assert torch.equal(parameters["layers.0.self_attn.qkv_proj.weight"], torch.cat(fused))
    assert torch.equal(parameters["embed_tokens.weight"][:70], sources["model.embed_tokens.weight"].tensor)
    assert not parameters["embed_tokens.weight"][70:].any()


@pytest.mark.parametrize(
    ("config", "shapes", "prefix", "others"),
    [
        (LLAMA, LLAMA_SHAPES, "model.", [""]),
        (GPT2, GPT2_SHAPES, "transformer.", [""]),
        (OPT, OPT_SHAPES, "model.decoder.", ["decoder.", ""]),
    ],
)
def test_prefixes_of_real_checkpoints(config: Any, shapes: Any, prefix: str, others: list[str]) -> None:
    expected = loaded(build(config), make_sources(shapes))
    for other in others:
        renamed = [Source(name.replace(prefix, other, 1), s.tensor) for name, s in make_sources(shapes).items()]
        for name, parameter in loaded(build(config), renamed).items():
            assert torch.equal(parameter, expected[name]), name


def test_conv1d_weights_are_transposed() -> None:
    sources = make_sources(GPT2_SHAPES)
    parameters = loaded(build(GPT2), sources)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        weight = parameters[f"h.0.{name}.weight"]
        assert torch.equal(weight, sources[f"transformer.h.0.{name}.weight"].tensor.t())
        assert weight.is_contiguous()


def test_documented_buffers_are_skipped_and_only_those() -> None:
    buffers = {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.0.attn.masked_bias": ()}
    loaded(build(GPT2), make_sources(GPT2_SHAPES | buffers))
    loaded(build(LLAMA), make_sources(LLAMA_SHAPES | {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}))
    with pytest.raises(
        ValueError, match=r"no module or parameter named 'transformer.h.0.attn.base' in GPT2LMHeadModel"
    ):
        loaded(build(GPT2), make_sources(GPT2_SHAPES | {"transformer.h.0.attn.base": (2,)}))
    with pytest.raises(ValueError, match=r"no module or parameter named 'model.layers.7.mlp.up_proj.weight' in Llama"):
        loaded(build(LLAMA), make_sources(LLAMA_SHAPES | {"model.layers.7.mlp.up_proj.weight": (24, 16)}))


def test_tied_head() -> None:
    untied = make_sources(LLAMA_SHAPES)
    embedding, head = untied["model.embed_tokens.weight"].tensor, untied["lm_head.weight"].tensor
    model = build(LLAMA, tie_word_embeddings=True)
    loaded(model, untied)  # a tied checkpoint that carries both: the embedding counts
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:70], embedding)
    only_head = [source for name, source in untied.items() if name != "model.embed_tokens.weight"]
    model = build(LLAMA, tie_word_embeddings=True)
    loaded(model, only_head)
    assert torch.equal(model.embed_tokens.weight[:70], head)
    with pytest.raises(ValueError, match=r"not initialized from checkpoint: \{'embed_tokens.weight'\}"):
        loaded(build(LLAMA), only_head)


def test_missing_weights_are_named_as_the_checkpoint_names_them() -> None:
    sources = make_sources(LLAMA_SHAPES)
    del sources["model.layers.0.self_attn.k_proj.weight"], sources["model.norm.weight"], sources["lm_head.weight"]
    message = (
        r"Following weights were not initialized from checkpoint: "
        r"\{'layers.0.self_attn.k_proj.weight', 'lm_head.weight', 'norm.weight'\}"
    )
    with pytest.raises(ValueError, match=message):
        loaded(build(LLAMA), sources)


@pytest.mark.parametrize(
    ("config", "shapes", "name", "shape"),
    [
        (LLAMA, LLAMA_SHAPES, "model.embed_tokens.weight", (71, 16)),
        (LLAMA, LLAMA_SHAPES, "model.layers.0.self_attn.k_proj.weight", (16, 16)),
        (LLAMA, LLAMA_SHAPES, "model.layers.0.mlp.down_proj.weight", (24, 16)),
        (LLAMA, LLAMA_SHAPES, "model.norm.weight", (17,)),
        (GPT2, GPT2_SHAPES, "transformer.h.0.attn.c_attn.weight", (48, 16)),
        (GPT2, GPT2_SHAPES, "transformer.h.0.attn.c_attn.bias", (16,)),
    ],
)
def test_wrong_shape_names_tensor_and_both_shapes(config: Any, shapes: Any, name: str, shape: Any) -> None:
    right = str(shapes[name]).replace("(", r"\(").replace(")", r"\)")
    wrong = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"shape mismatch for '{name}': the checkpoint has {wrong}, .*{right}"):
        loaded(build(config), make_sources(shapes | {name: shape}))


def test_dtype_is_converted_while_copying() -> None:
    sources = make_sources(LLAMA_SHAPES, torch.bfloat16)
    parameters = loaded(build(LLAMA), sources)
    assert parameters["norm.weight"].dtype == torch.float32
    assert torch.equal(parameters["norm.weight"], sources["model.norm.weight"].tensor.float())


@pytest.mark.parametrize(("config", "shapes"), [(LLAMA, LLAMA_SHAPES), (GPT2, GPT2_SHAPES), (OPT, OPT_SHAPES)])
def test_a_rank_reads_only_its_part_and_the_parts_make_the_whole(config: Any, shapes: Any) -> None:
    whole = loaded(build(config), make_sources(shapes))
    ranks, read = [], []
    for rank in range(2):
        sources = make_sources(shapes)
        ranks.append(loaded(build(config, TensorParallel(rank, 2)), sources))
        read.append(sources)
    for name in shapes:
        parts = [sum(sources[name].read) for sources in read]
        total = read[0][name].tensor.numel()
        split = len(shapes[name]) == 2 and "positions" not in name and "wpe" not in name
        if split:
            assert sum(parts) == total, name
        else:
            assert all(part in (total, total // 2) for part in parts), name
    first, second = (
        next(p for n, p in r.items() if "down_proj" in n or "fc2.w" in n or "mlp.c_proj.w" in n) for r in ranks
    )
    row_parallel = next(p for n, p in whole.items() if "down_proj" in n or "fc2.w" in n or "mlp.c_proj.w" in n)
    assert torch.equal(torch.cat([first, second], dim=1), row_parallel)


def test_families_refuse_ranks_that_do_not_divide_them() -> None:
    with pytest.raises(ValueError, match=r"attention heads \(4\) must be divisible by tensor parallel size \(3\)"):
        build(LLAMA, TensorParallel(0, 3))
