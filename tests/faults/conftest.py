"""Engines on real Ray processes, with ranks that make tokens up and do harm when told to."""

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
