"""A job that has a hub token leaves no file and no line of a log that holds it; Ray's own logs included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shoal.driver.jobs.outcome import Exit

IN_ENVIRONMENT = "hf_ThisOneIsInTheEnvironmentOfTheJob000"
IN_CONFIG = "hf_ThisOneIsAnArgumentOfTheEngine00000000"
ROWS = [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(20)]


def holding(folder: Path, secrets) -> list[str]:
    """Files under `folder` that hold one of the secrets."""
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        found += [f"{path}: {secret}" for secret in secrets if secret.encode() in content]
    return found


@pytest.fixture
def ray_logs(ray_cluster):
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"


def test_no_trace_of_a_token(start, run, write_rows, tmp_path, ray_logs, monkeypatch, caplog):
    secrets = (IN_ENVIRONMENT, IN_CONFIG)
    source = write_rows([*ROWS, {"id": "bad", "prompt": "x", "sampling_params": {"temperature": -1}}])
    monkeypatch.setenv("SHOAL_STUB_RUNTIME_ENV", "1")  # which Ray logs
    ran = start(source, forked=False, env={"HF_TOKEN": IN_ENVIRONMENT, "RAY_BACKEND_LOG_LEVEL": "debug"})
    assert ran.end() == Exit.COMPLETED, ran.log.read_text()
    assert "completed: 20 rows answered" in ran.log.read_text()

    # A second job fails, with the token as an argument and another in an address that its error repeats.
    monkeypatch.setenv("HF_TOKEN", IN_ENVIRONMENT)
    engine = {"hf_token": IN_CONFIG, "tensor_parallel_size": 3}
    failed = run(source, output=str(tmp_path / "failed.jsonl"), engine=engine)
    assert failed.code == Exit.USAGE
    assert "must be divisible by tensor parallel size (3)" in failed.status()["message"]
    shown = json.dumps(failed.report()) + caplog.text
    assert not [secret for secret in secrets if secret in shown]

    assert len(list(ray_logs.rglob("*"))) > 5
    assert not holding(tmp_path, secrets)
    assert not holding(ray_logs, secrets)


def test_errors_with_addresses_hide_what_is_in_them(tmp_path):
    """What the command prints when an address with a password cannot be opened."""
    script = """
        import sys
        from shoal.driver.cli import main
        sys.exit(main(["run-batch", "-i", "nowhere://me:pa55word@host/in.jsonl?token=abcdefgh", "-o", "o.jsonl",
                       "--model", "m"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path, env={**os.environ, "HF_TOKEN": IN_ENVIRONMENT}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "nowhere://***@host/in.jsonl?token=***" in done.stderr
    assert "pa55word" not in done.stderr + done.stdout
