"""Engines on real Ray processes, with ranks that make tokens up and do harm when told to."""

from __future__ import annotations

import pytest


@pytest.fixture
def make_llm(stub_ranks, stub_model, monkeypatch):
    """make_llm(**engine arguments) -> LLM with stub ranks; `llm.deaths` is what it told of."""
    from shoal import LLM
    from shoal.driver import engine

    before = stub_ranks.install()
    monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.005")
    made = []

    def make(**arguments):
        llm = LLM(stub_model, **{"max_num_seqs": 8, "max_model_len": 256, "restart_backoff_s": 0.05, **arguments})
        made.append(llm)
        llm.deaths, collect = [], llm.llm_engine.collect

        def noted(timeout):
            collected = collect(timeout)
            llm.deaths += collected.deaths
            return collected

        llm.llm_engine.collect = noted
        return llm

    yield make
    for llm in made:
        llm.shutdown()
    engine.RemoteDriver = before
