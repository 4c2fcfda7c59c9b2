"""What `import shoal` gives, and what it does not bring along."""

import subprocess
import sys

import pytest

import shoal


def test_all_is_sorted_and_resolves():
    assert shoal.__all__ == sorted(shoal.__all__)
    for name in shoal.__all__:
        assert getattr(shoal, name) is not None
        assert name in dir(shoal)


def test_what_users_import():
    expected = {
        "LLM",
        "SamplingParams",
        "BeamSearchParams",
        "RequestOutput",
        "CompletionOutput",
        "Logprob",
        "BeamSearchOutput",
        "TextPrompt",
        "TokensPrompt",
        "EngineConfig",
    }
    assert expected <= set(shoal.__all__)


def test_unknown_names():
    with pytest.raises(AttributeError, match="'shoal' has no attribute 'PoolingParams'"):
        shoal.PoolingParams  # noqa: B018


def test_version():
    from importlib.metadata import version

    assert shoal.__version__ == version("shoal")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import shoal", {"torch", "transformers", "ray", "numpy", "pydantic", "tokenizers"}),
        ("from shoal import LLM, SamplingParams, RequestOutput", {"torch", "transformers", "ray"}),
    ],
)
def test_imports_are_lazy(code, absent):
    check = f"{code}\nimport sys\nfound = {absent!r} & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
