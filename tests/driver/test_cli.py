"""The command `shoal`, and engine arguments as flags."""

import argparse
import subprocess
import sys
from importlib import import_module

import pytest

import shoal
from shoal.driver.cli import COMMANDS, main
from shoal.driver.cli_options import add_engine_options, engine_arguments
from shoal.driver.config import EngineConfig, make_config


def parse(*arguments):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_engine_options(parser)
    return engine_arguments(parser.parse_args(arguments))


def test_every_command_resolves():
    for name, (summary, module) in COMMANDS.items():
        assert summary
        assert callable(import_module(module).add_arguments), name
        assert callable(import_module(module).run), name


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"shoal {shoal.__version__}\n"


def test_help_imports_no_engine():
    code = (
        "import sys\nfrom shoal.driver.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'ray', 'pydantic', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
    assert "bench" in result.stdout


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bensh"])
    assert ended.value.code == 2
    assert "invalid choice: 'bensh'" in capsys.readouterr().err


def test_version_of_a_tree_that_is_not_installed(monkeypatch):
    import importlib.metadata

    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    installed = shoal.__version__
    monkeypatch.setattr(importlib.metadata, "version", nowhere)
    assert shoal.__version__ == installed


def test_every_engine_argument_has_a_flag_with_its_meaning():
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    text = " ".join(parser.format_help().split())
    for name, field in EngineConfig.model_fields.items():
        if name not in ("model", "hf_token"):  # the latter is refused, see test_secrecy.py
            assert "--" + name.replace("_", "-") in text
            assert field.description, name
            assert " ".join(field.description.split())[:30] in text.replace("- ", "-"), name


def test_flags_become_engine_arguments():
    assert parse() == {}
    arguments = parse(
        "--max-num-seqs", "512", "--gpu-memory-utilization", "0.5", "--no-enable-prefix-caching", "--enforce-eager",
        "--dtype", "float32", "--hf-overrides", '{"num_hidden_layers": 2}', "--logits-processors", "a.b:C", "d.e:F",
        "--pipeline-parallel-size", "1",
    )  # fmt: skip
    config = make_config(model="m", **arguments)
    assert config.max_num_seqs == 512
    assert config.gpu_memory_utilization == 0.5
    assert not config.enable_prefix_caching
    assert config.enforce_eager
    assert config.dtype == "float32"
    assert config.hf_overrides == {"num_hidden_layers": 2}
    assert config.logits_processors == ["a.b:C", "d.e:F"]
    assert make_config(model="m", max_num_seqs=512) == make_config(model="m", **parse("--max-num-seqs", "512"))


def test_values_are_checked_by_the_config():
    with pytest.raises(ValueError, match=r"max_num_seqs: .*greater than or equal to 1"):
        make_config(model="m", **parse("--max-num-seqs", "0"))
    with pytest.raises(SystemExit):
        parse("--dtype", "int3")
    with pytest.raises(SystemExit):
        parse("--hf-overrides", "[1]")


def test_a_flag_keeps_apart_from_the_commands_own_argument():
    parser = argparse.ArgumentParser()
    parser.set_defaults(seed="the command's")
    add_engine_options(parser)
    args = parser.parse_args(["--seed", "4"])
    assert args.seed == "the command's"
    assert engine_arguments(args) == {"seed": "4"}
