"""Secrets stay out of errors, logs and other processes' environments; templates are read where it is allowed."""

from __future__ import annotations

import logging
import os

import pytest

from shoal.driver.cli import main
from shoal.driver.config import make_config
from shoal.driver.jobs.config import load_job, make_job
from shoal.driver.local_files import read_template
from shoal.driver.log import LOGGER
from shoal.driver.secrecy import is_secret, masked

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


def test_names_of_secrets():
    assert all(map(is_secret, ("hf_token", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "password")))
    assert not any(map(is_secret, ("HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HOME", "stop_token_ids")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"GET with {TOKEN} failed", "GET with *** failed"),
        ("input 'https://me:pw@host/a.jsonl' is gone", "input 'https://***@host/a.jsonl' is gone"),
        ("s3://bucket/key@2", "s3://bucket/key@2"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/x?sig=a%2Fb' and more", "https://h/x?sig=***' and more"),
        ("hf_overrides={'a': 1}; skip_tokenizer_init", "hf_overrides={'a': 1}; skip_tokenizer_init"),
    ],
)
def test_masked(text, shown):
    assert masked(text) == shown


def test_tokens_of_the_environment_are_masked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "short")
    assert masked("with a-token-of-another-form: a short one") == "with ***: a short one"


def test_what_is_logged_is_masked(monkeypatch):
    seen = []

    class Keep(logging.Handler):
        def emit(self, record):
            seen.append(self.format(record))

    handler = Keep()
    LOGGER.addHandler(handler)
    try:
        LOGGER.warning("opening %s, %d%%", f"https://u:p@h/?token={TOKEN}", 5)
    finally:
        LOGGER.removeHandler(handler)
    assert seen == ["opening https://***@h/?token=***, 5%"]


def test_errors_do_not_repeat_a_token(tmp_path):
    for call in (
        lambda: make_config(model="m", hf_token=[TOKEN]),
        lambda: make_job({"input": "x", "output": "y.jsonl", "engine": {"model": "m"}, "hf_token": TOKEN}),
        lambda: make_job({"input": "x", "output": "y.jsonl", "engine": {"model": "m", "hf_token": {"a": TOKEN}}}),
    ):
        with pytest.raises(ValueError, match="hf_token") as raised:
            call()
        assert TOKEN not in str(raised.value)
    config = make_config(model="m", hf_token=TOKEN)
    job = make_job({"input": "x", "output": "y.jsonl", "engine": {"model": "m", "hf_token": TOKEN}})
    assert TOKEN not in repr(config) + str(config) + repr(job) + str(job)


def test_a_job_file_holds_no_token(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(f"input: x\noutput: y.jsonl\nengine: {{model: m, hf_token: {TOKEN}}}\n")
    with pytest.raises(ValueError, match=r"engine.hf_token: .* set HF_TOKEN, or HF_TOKEN_PATH") as raised:
        load_job(str(path), {})
    assert TOKEN not in str(raised.value)
    path.write_text("input: x\noutput: y.jsonl\nengine: [m]\n")
    with pytest.raises(ValueError, match="engine must hold a mapping of fields, got list"):
        load_job(str(path), {})


@pytest.mark.parametrize("command", [["run-batch"], ["bench", "throughput"]])
@pytest.mark.parametrize("form", [["--hf-token", TOKEN], [f"--hf-token={TOKEN}"]])
def test_no_token_on_a_command_line(command, form, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, *form])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "--hf-token: a command line is seen by others; set HF_TOKEN" in printed
    assert TOKEN not in printed


def test_no_secret_goes_into_a_runtime_env(monkeypatch):
    """Ray writes runtime_envs to its logs and shows them in its dashboard."""
    from shoal.driver import engine

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    monkeypatch.setenv("HF_TOKEN_PATH", "/run/secrets/hf_token")
    sent = engine.environment()
    assert TOKEN not in repr(sent)
    assert sent["HF_TOKEN_PATH"] == "/run/secrets/hf_token"


def test_template_files_are_read_in_allowed_folders_only(tmp_path, monkeypatch):
    inside, outside = tmp_path / "work", tmp_path / "other"
    inside.mkdir()
    outside.mkdir()
    (inside / "t.jinja").write_text("in")
    (outside / "t.jinja").write_text("out")
    (inside / "link.jinja").symlink_to(outside / "t.jinja")
    monkeypatch.chdir(inside)
    assert read_template("chat_template", "{{ a }}", None) == "{{ a }}"
    assert read_template("chat_template", "t.jinja", None) == "in"
    assert read_template("chat_template", str(outside / "t.jinja"), str(outside)) == "out"
    assert read_template("chat_template", "link.jinja", "../other") == "out"
    for value in ("link.jinja", "../other/t.jinja", str(outside / "t.jinja"), "/proc/self/environ", "/etc/passwd"):
        with pytest.raises(ValueError, match=r"chat_template .* lies outside of .*allowed_local_path"):
            read_template("chat_template", value, None)
    with pytest.raises(ValueError, match=r"neither Jinja text .* nor a file"):
        read_template("chat_template", "missing.jinja", None)
    (inside / "large").write_bytes(b"x" * (4 << 20) + b"x")
    with pytest.raises(ValueError, match="at most 4194304"):
        read_template("chat_template", "large", None)
    (inside / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read"):
        read_template("chat_template", "binary", None)
    os.mkfifo(inside / "pipe")
    with pytest.raises(ValueError, match="nor a file"):
        read_template("chat_template", "pipe", None)


def test_the_allowed_folder_is_there(tmp_path):
    assert make_config(model="m", allowed_local_path=str(tmp_path)).allowed_local_path == str(tmp_path)
    with pytest.raises(ValueError, match="allowed_local_path must be a folder"):
        make_config(model="m", allowed_local_path=str(tmp_path / "missing"))
