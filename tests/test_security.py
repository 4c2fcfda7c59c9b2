"""What no source of driver/, workers/ and kernels/ may do, read from the sources; what is off unless asked for."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for layer in ("driver", "workers", "kernels", "shoal") for path in (ROOT / layer).rglob("*.py"))
SOURCES = [path for path in SOURCES if not any(part.is_symlink() for part in path.parents)]

# Modules whose reading of bytes runs code, and what may be taken from them.
UNPICKLE = {"pickle": {"UnpicklingError"}, "cloudpickle": set(), "dill": set(), "joblib": set(), "marshal": set()}
UNPICKLE |= {"shelve": set(), "_pickle": set(), "torch.package": set()}
# Calls by name, and why not.
CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "runs text",
    "__import__": "use import_module on names from tables",
    "os.system": "a shell",
    "os.popen": "a shell",
    "yaml.load": "makes objects: safe_load",
    "yaml.unsafe_load": "makes objects",
    "yaml.full_load": "makes objects",
    "ray.cloudpickle.loads": "unpickles",
}
# torch.distributed's ways of sending any object, which the other end unpickles.
OBJECT_METHODS = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"}
OBJECT_METHODS |= {"send_object_list", "recv_object_list"}


def faults(source: str) -> list[str]:
    """Everything in `source` that the rules above forbid, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {one.name}" for one in node.names if one.name in UNPICKLE]
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLE:
            extra = {one.name for one in node.names} - UNPICKLE[node.module]
            found += [f"{node.lineno}: {node.module}.{name}" for name in sorted(extra)]
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in call_faults(node)]
    return found


def call_faults(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}

    def is_constant(argument: str, value: object) -> bool:
        return isinstance(given.get(argument), ast.Constant) and given[argument].value is value  # type: ignore[union-attr]

    found = [f"{name}: {CALLS[name]}"] if name in CALLS else []
    method = name.rpartition(".")[2]
    # multiprocessing's connection.recv() unpickles, recv_bytes() does not; torch.distributed's recv is given a tensor.
    if method in OBJECT_METHODS or (method == "recv" and not node.args):
        found.append(f"{name} unpickles")
    if name == "torch.load" and not is_constant("weights_only", True):
        found.append("torch.load without weights_only=True")
    if method == "load" and "allow_pickle" in given and not is_constant("allow_pickle", False):
        found.append(f"{name} with pickle")
    if "shell" in given and not is_constant("shell", False):
        found.append(f"{name} through a shell")
    if "authkey" in given and is_constant("authkey", None):
        found.append(f"{name} without authentication")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert not faults(path.read_text())


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval('1')",
        "yaml.load(text)",
        "connection.recv()",
        "dist.broadcast_object_list(objects)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "Listener(address, family, authkey=None)",
    ],
)
def test_the_rules_see_it(bad):
    assert len(faults(bad)) == 1


@pytest.mark.parametrize(
    "good", ["from pickle import UnpicklingError", "connection.recv_bytes()", "dist.recv(tensor, 0)"]
)
def test_the_rules_let_it_pass(good):
    assert not faults(good)


def test_sockets_are_authenticated():
    """Every listener and client of the step channel names an authkey, or it takes plans from anybody."""
    calls = []
    for path in SOURCES:
        text = path.read_text()
        if "multiprocessing.connection" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Listener", "Client"):
                calls.append((path.name, "authkey" in {keyword.arg for keyword in node.keywords}))
    assert len(calls) >= 2
    assert all(has_key for _, has_key in calls), calls


MARK = """
import pathlib
from transformers import PretrainedConfig, PreTrainedTokenizerFast
pathlib.Path({path!r}).write_text("ran")
class OwnConfig(PretrainedConfig):
    model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_a_model_runs_only_when_asked_for(tiny_checkpoint, tmp_path):
    import shutil

    from shoal.driver.config import EngineConfig, make_config
    from shoal.driver.model_config import resolve_all

    assert EngineConfig.model_fields["trust_remote_code"].default is False
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    (folder / "own.py").write_text(MARK.format(path=str(mark)))
    for name, entry in (
        ("config.json", {"AutoConfig": "own.OwnConfig"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.OwnTokenizer"]}),
    ):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = entry
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "OwnTokenizer"
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="code of its own, which runs only with trust_remote_code=True"):
        resolve_all(make_config(model=str(folder)))
    assert not mark.exists()
    resolve_all(make_config(model=str(folder), trust_remote_code=True))
    assert mark.exists()  # else the test above saw nothing


LONG_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{30,})")


def test_no_token_in_the_tree():
    import subprocess

    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    made_up = {"tests/workers/loading/test_hub.py", "tests/driver/test_secrecy.py", "tests/jobs/test_secrets.py"}
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if name in made_up or path.is_symlink() or not path.is_file() or os.path.getsize(path) > 1 << 20:
            continue
        found = LONG_TOKEN.findall(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, name
