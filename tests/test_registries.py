"""Literal tables of lazy names: every row resolves, an unknown key names the nearest."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from shoal.workers.models import registry
from shoal.workers.models.base import Model
from shoal.workers.models.registry import MODELS, load_model_class, register_model, resolve_architecture
from shoal.workers.models.spec import ModelSpec


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = dict(registry.MODELS)
    yield
    registry.MODELS.clear()
    registry.MODELS.update(before)


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_every_model_resolves(architecture: str) -> None:
    cls = load_model_class(architecture)
    assert issubclass(cls, Model)
    assert f"{cls.__module__}:{cls.__name__}" == MODELS[architecture]
    assert cls is load_model_class(MODELS[architecture])


def test_the_first_known_architecture_counts() -> None:
    assert resolve_architecture(["SomethingElse", "OPTForCausalLM", "LlamaForCausalLM"]) == "OPTForCausalLM"


@pytest.mark.parametrize(
    ("architectures", "near"),
    [
        (["LlamaForCasualLM"], "LlamaForCausalLM"),
        (["GPT2Model"], "GPT2LMHeadModel"),
        (["Qwen3ForCausalLLM", "Nope"], "Qwen3ForCausalLM"),
    ],
)
def test_unknown_architectures_name_what_was_found_the_nearest_and_the_override(
    architectures: list[str], near: str
) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_architecture(architectures)
    message = str(caught.value)
    assert f"Model architectures {architectures} are not supported" in message
    assert f"Nearest known: {near}" in message
    assert f'hf_overrides={{"architectures": ["{near}"]}}' in message
    assert all(name in message for name in MODELS)


@pytest.mark.parametrize("architectures", [None, [], ()])
def test_missing_architectures_show_the_override(architectures: list[str] | None) -> None:
    with pytest.raises(ValueError, match="No model architectures are specified") as caught:
        resolve_architecture(architectures, model_type="gpt2")
    assert "its model_type is 'gpt2'" in str(caught.value)
    assert 'hf_overrides={"architectures": ["GPT2LMHeadModel"]}' in str(caught.value)
    with pytest.raises(ValueError, match=r'hf_overrides=\{"architectures": \["OPTForCausalLM"\]\}'):
        resolve_architecture(architectures, model_type="opt")


def test_a_family_from_outside_the_tree() -> None:
    register_model("MyForCausalLM", "shoal.workers.models.qwen3:Qwen3ForCausalLM")
    assert load_model_class("MyForCausalLM").__name__ == "Qwen3ForCausalLM"
    config = SimpleNamespace(
        architectures=["MyForCausalLM"],
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    assert ModelSpec.from_hf(config).model_class == "shoal.workers.models.qwen3:Qwen3ForCausalLM"
    with pytest.raises(ValueError, match=r"target must look like 'package.module:Class', got 'qwen3'"):
        register_model("MyForCausalLM", "qwen3")


def test_every_op_resolves_with_its_implementations() -> None:
    import inspect

    from shoal.kernels.op import Op
    from shoal.kernels.registry import OPS, load_op

    for name in OPS:
        op = load_op(name)
        assert isinstance(op, Op), name
        for implementation in op.implementations:
            parameters = inspect.signature(op.get(implementation)).parameters
            assert list(parameters) == list(inspect.signature(op.reference).parameters), (name, implementation)
