"""Pipelines on real Ray processes: driver actor, scheduler and step channel as they are, ranks that make tokens up."""

from __future__ import annotations

import pytest


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
