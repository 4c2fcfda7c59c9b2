"""EngineConfig and what the engine makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shoal.driver.config import GIB, NOT_SUPPORTED, EngineConfig, UnknownArgumentError, cpu_kvcache_bytes, make_config
from shoal.driver.resolve import (
    check_model_len,
    count_blocks,
    pick_device,
    plans_in_flight,
    resolve_budgets,
    scarcest,
)

SPEC = SimpleNamespace(max_position_embeddings=2048)


def test_every_field_has_a_default_and_a_docstring() -> None:
    import ast
    import inspect

    body = ast.parse(inspect.getsource(EngineConfig)).body[0].body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            name = statement.target.id
            assert isinstance(following, ast.Expr), f"{name} has no docstring"
            assert isinstance(following.value.value, str), f"{name} has no docstring"
            assert name == "model" or not EngineConfig.model_fields[name].is_required(), f"{name} has no default"


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(UnknownArgumentError, match="'max_num_seq'; did you mean 'max_num_seqs'"):
        make_config(model="m", max_num_seq=4)


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_later_features_are_refused_by_name(name) -> None:
    with pytest.raises(ValueError, match=rf"{name}='embed': .* is not supported by this version"):
        make_config(model="m", **{name: "embed"})
    make_config(model="m", **{name: None})


def test_names_of_both_generations() -> None:
    with pytest.warns(DeprecationWarning, match="runner"):
        assert make_config(model="m", task="generate").runner == "generate"
    with pytest.warns(DeprecationWarning, match="swap_space"):
        make_config(model="m", swap_space=4)
    assert make_config(model="m", convert="none", data_parallel_size=1, async_scheduling=None).async_scheduling


def test_the_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(make_config(model="m", hf_token="hf_secret"))


def test_cpu_cache_space(monkeypatch) -> None:
    monkeypatch.delenv("SHOAL_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert cpu_kvcache_bytes() == 4 * GIB
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert cpu_kvcache_bytes() == 7 * GIB
    monkeypatch.setenv("SHOAL_CPU_KVCACHE_SPACE", "0.5")
    assert cpu_kvcache_bytes() == GIB // 2
    for bad in ("0", "-1", "many", "nan", "inf"):
        monkeypatch.setenv("SHOAL_CPU_KVCACHE_SPACE", bad)
        with pytest.raises(ValueError, match="SHOAL_CPU_KVCACHE_SPACE must be a positive number of GiB"):
            cpu_kvcache_bytes()


def test_max_model_len(monkeypatch) -> None:
    assert check_model_len(make_config(model="m"), SPEC) == 2048
    assert check_model_len(make_config(model="m", max_model_len=-1), SPEC) == 2048
    assert check_model_len(make_config(model="m", max_model_len=100), SPEC) == 100
    longer = make_config(model="m", max_model_len=4096)
    with pytest.raises(ValueError, match=r"max_model_len \(4096\) is greater than the derived max_model_len \(2048"):
        check_model_len(longer, SPEC)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert check_model_len(longer, SPEC) == 4096


def test_device() -> None:
    assert pick_device(make_config(model="m"), {"CPU": 4.0}) == "cpu"
    assert pick_device(make_config(model="m"), {"CPU": 4.0, "GPU": 2.0}) == "cuda"
    assert pick_device(make_config(model="m", device="cpu"), {"GPU": 2.0}) == "cpu"
    with pytest.raises(ValueError, match="tensor_parallel_size=4 needs 4 GPU"):
        pick_device(make_config(model="m", tensor_parallel_size=4), {"GPU": 2.0})
    with pytest.raises(ValueError, match="has 0"):
        pick_device(make_config(model="m", device="cuda"), {})


def test_stages() -> None:
    with pytest.raises(ValueError, match="pipeline_parallel_size=3 needs 6 GPU"):
        pick_device(make_config(model="m", tensor_parallel_size=2, pipeline_parallel_size=3), {"GPU": 5.0})
    assert scarcest([100, 90, 80], [10, 5, 7]) == (100, 10), "10, 18 and 11 blocks"
    staged = make_config(model="m", pipeline_parallel_size=3, lookahead=2)
    assert plans_in_flight(staged, steady=False) == 4, "one in each stage, and two that wait"
    assert plans_in_flight(staged, steady=True) == 0
    assert plans_in_flight(make_config(model="m", pipeline_parallel_size=3, lookahead=0), steady=False) == 0


def test_budgets() -> None:
    large = [{"total": 80 * GIB}]
    assert resolve_budgets(make_config(model="m"), 2048, large) == (1024, 16384)
    assert resolve_budgets(make_config(model="m"), 2048, [{"total": 24 * GIB}]) == (256, 8192)
    assert resolve_budgets(make_config(model="m"), 2048, [{}]) == (256, 2048)
    assert resolve_budgets(make_config(model="m", max_num_batched_tokens=100), 2048, [{}]) == (100, 100)
    assert resolve_budgets(make_config(model="m", max_num_seqs=2), 64, [{}]) == (2, 128)
    whole = make_config(model="m", enable_chunked_prefill=False)
    assert resolve_budgets(whole, 32768, large) == (1024, 32768)


def test_cache_size() -> None:
    config = make_config(model="m", block_size=16)
    assert count_blocks(config, 1000 * 64, 64, 2048) == (1000, 2048)
    with pytest.raises(ValueError, match="the estimated maximum model length is 160"):
        count_blocks(config, 10 * 64, 64, 2048)
    with pytest.raises(ValueError, match="No available memory for the cache blocks"):
        count_blocks(config, 63, 64, 2048)
    assert count_blocks(make_config(model="m", max_model_len=-1), 10 * 64, 64, 2048) == (10, 160)
    assert count_blocks(make_config(model="m", num_gpu_blocks_override=3), 0, 64, 2048) == (3, 2048)
