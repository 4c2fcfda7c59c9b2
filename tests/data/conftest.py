"""Pipelines on real Ray processes: driver actor, scheduler and step channel as they are, ranks that make tokens up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).resolve().parents[1] / "stub" / "stub_ranks.py"


@pytest.fixture(scope="session")
def stub_ranks():
    if "stub_ranks" not in sys.modules:
        spec = importlib.util.spec_from_file_location("stub_ranks", STUB)
        sys.modules["stub_ranks"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["stub_ranks"]


@pytest.fixture(scope="session")
def stub_model(stub_ranks, tmp_path_factory):
    return stub_ranks.make_model(tmp_path_factory.mktemp("stub-model"))


@pytest.fixture
def build(ray_cluster, stub_ranks, stub_model, monkeypatch):
    """build(preprocess, postprocess, engine=..., **fields) -> processor with stub ranks."""
    import ray

    from shoal.data import build_processor
    from shoal.driver.data import processor

    ray.cloudpickle.register_pickle_by_value(stub_ranks)
    monkeypatch.setattr(processor, "RowModel", stub_ranks.StubModel)
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.001")

    def make(preprocess=None, postprocess=None, **fields):
        engine = {"model": stub_model, "max_num_seqs": 8, "max_model_len": 256, **fields.pop("engine", {})}
        sampling = {"max_tokens": 8, "ignore_eos": True, **fields.pop("sampling_params", {})}
        return build_processor({"engine": engine, "sampling_params": sampling, **fields}, preprocess, postprocess)

    return make
