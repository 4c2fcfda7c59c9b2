"""The hub, spoken to through HF_ENDPOINT: a local server that answers as the hub does and notes what was asked."""

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shoal.workers.loading.hub import ensure_files

TOKEN = "hf_thisIsTheSecretToken"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
LARGE = bytes(range(256)) * (24 << 12)  # 24 MiB: the hub's client keeps what came in pieces of 10 MiB
CONFIG = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"a": 1}',  # files of equal content are sent once only
    "generation_config.json": b'{"b": 2}',
    "merges.txt": b"a b",
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
}
OTHER = {
    "README.md": b"read me",
    "model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"no",
    "optimizer.bin": b"no",
    "modeling_own.py": b"x = 1",
}


@dataclass
class Hub:
    """What the server offers, and what it was asked for."""

    repos: dict = field(default_factory=dict)
    log: list = field(default_factory=list)  # (method, path, Range or None)
    private: set = field(default_factory=set)
    gated: set = field(default_factory=set)
    cut: dict = field(default_factory=dict)  # file -> how many more times its transfer breaks half-way
    hold: dict = field(default_factory=dict)  # file -> how many must have asked for anything before it is sent
    url: str = ""

    def wait_for_askers(self, count, timeout=60):
        """Until so many processes have asked what the repository holds: they all work at the same time."""
        deadline = time.monotonic() + timeout
        while sum("/revision/" in path for _, path, _ in self.log) < count and time.monotonic() < deadline:
            time.sleep(0.02)

    def fetched(self):
        """Files whose content was sent."""
        found = (re.fullmatch(r".*/resolve/[^/]+/(.+)", path) for method, path, _ in self.log if method == "GET")
        return {match[1] for match in found if match}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server.hub, self.path.split("?")[0]
        hub.log.append((self.command, path, self.headers.get("Range")))
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?", path) or re.fullmatch(
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path
        )
        if match is None:
            return self.refuse(404, None)
        name, revision = match[1], match[2] or "main"
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in hub.repos or (name in hub.private and not allowed):
            return self.refuse(401, "RepoNotFound" if allowed else None)
        if name in hub.gated and not allowed:
            return self.refuse(403, "GatedRepo")
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.refuse(404, "RevisionNotFound")
        files = hub.repos[name][commit]
        if not path.startswith("/api/"):
            return self.send_file(match[3], files.get(match[3]), commit)
        if "/tree/" in path:
            rows = [{"type": "file", "path": p, "size": len(c), "oid": etag(c)} for p, c in files.items()]
            return self.send(200, json.dumps(rows).encode())
        info = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        return self.send(200, json.dumps(info).encode())

    def send_file(self, file, content, commit):
        if content is None:
            return self.refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.send(206, content[start:], headers)
        if self.command == "GET" and file in self.server.hub.hold:
            self.server.hub.wait_for_askers(self.server.hub.hold[file])
        if self.command == "GET" and self.server.hub.cut.get(file, 0) > 0:
            self.server.hub.cut[file] -= 1
            return self.send(200, content, headers, cut=len(content) // 2)
        return self.send(200, content, headers)

    def refuse(self, status, code):
        self.send(status, b"{}", {"X-Error-Code": code} if code else {})

    def send(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.wfile.flush()
        if cut is not None:
            self.close_connection = True


def etag(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.hub
    server.shutdown()
    thread.join()
    server.server_close()


def add(hub, name, files, revision="main"):
    hub.repos.setdefault(name, {})[COMMITS[revision]] = {**CONFIG, **OTHER, **files}


SCRIPT = """
    import json, sys
    from shoal.workers.loading.hub import ensure_files

    arguments = json.loads(sys.argv[1])
    try:
        print("OK", ensure_files(**arguments))
    except (ValueError, RuntimeError) as error:
        assert error.__suppress_context__ or error.__context__ is None  # the hub's exceptions carry the request
        print("ERROR", type(error).__name__, " ".join(str(error).split()))
"""


@pytest.fixture
def ask(hub, tmp_path):
    """Calls ensure_files in a process of its own, with this hub and an empty cache."""

    def run(model, kind="config", *, offline=False, endpoint=None, **arguments):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": endpoint or hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "NO_PROXY": "127.0.0.1",
        }
        call = json.dumps({"model": model, "kind": kind, **arguments})
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), call],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    return run


def names(answer):
    assert answer.startswith("OK "), answer
    folder = answer.removeprefix("OK ")
    return {name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))}


def test_a_local_path_wins(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ensure_files("org/name", kind="weights").samefile(tmp_path / "org" / "name")


@pytest.mark.parametrize("model", ["/no/such/folder", "./here", "a/b/c", "no:good", "missing.gguf"])
def test_what_can_be_no_hub_id(model):
    with pytest.raises(ValueError, match=f"Invalid repository ID or local directory specified: '{model}'"):
        ensure_files(model)


def test_config_fetches_config_and_tokenizer_only(hub, ask):
    add(hub, "org/m", {"model.safetensors": b"w", "model.safetensors.index.json": b"{}", "pytorch_model.bin": b"w"})
    assert names(ask("org/m")) == set(CONFIG)
    assert hub.fetched() == set(CONFIG)
    # A second start asks for no file again, and none at all where the network is off.
    hub.log.clear()
    assert names(ask("org/m")) == set(CONFIG)
    assert not hub.fetched()
    hub.log.clear()
    assert names(ask("org/m", offline=True)) == set(CONFIG)
    assert not hub.log
    assert "modeling_own.py" in names(ask("org/m", code=True))


def test_weights_prefer_safetensors_and_fetch_nothing_else(hub, ask):
    add(hub, "org/m", {"model.safetensors": b"w", "pytorch_model.bin": b"w", "adapter_model.safetensors": b"a"})
    assert names(ask("org/m", "weights")) == {"config.json", "model.safetensors"}
    assert hub.fetched() == {"config.json", "model.safetensors"}


def test_weights_follow_the_index(hub, ask):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = {name: name.encode() for name in index["weight_map"].values()}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), **shards}
    add(hub, "org/m", {**files, "model-old.safetensors": b"no", "pytorch_model-00001-of-00001.bin": b"no"})
    assert names(ask("org/m", "weights")) == {"config.json", *files}
    assert hub.fetched() == {"config.json", *files}
    hub.log.clear()
    assert names(ask("org/m", "weights", offline=True)) == {"config.json", *files}
    assert not hub.log


def test_weights_fall_back_to_pytorch_and_load_format_chooses(hub, ask):
    add(hub, "org/bin", {"pytorch_model.bin": b"w", "training_args.bin": b"no"})
    assert names(ask("org/bin", "weights")) == {"config.json", "pytorch_model.bin"}
    add(hub, "org/both", {"pytorch_model.bin": b"w", "model.safetensors": b"w"})
    assert names(ask("org/both", "weights", load_format="pt")) == {"config.json", "pytorch_model.bin"}
    assert ask("org/bin", "weights", load_format="safetensors").startswith(
        "ERROR RuntimeError Cannot find any model weights with `org/bin`"
    )


def test_revision(hub, ask):
    add(hub, "org/m", {"tokenizer.json": b"one"})
    add(hub, "org/m", {"tokenizer.json": b"two"}, "v2")
    for revision, commit, content in (("v2", "b" * 40, "two"), (None, "a" * 40, "one"), ("b" * 40, "b" * 40, "two")):
        folder = ask("org/m", revision=revision).removeprefix("OK ")
        assert folder.endswith(f"/snapshots/{commit}")
        with open(f"{folder}/tokenizer.json") as file:
            assert file.read() == content
    answer = ask("org/m", revision="v9")
    assert answer.startswith("ERROR ValueError revision 'v9' was not found in model 'org/m'")


def test_token(hub, ask, tmp_path):
    add(hub, "org/secret", {"model.safetensors": b"w"})
    hub.private.add("org/secret")
    answer = ask("org/secret")
    assert "Invalid repository ID or local directory specified: 'org/secret'" in answer
    assert "no token was given" in answer
    assert "the token given has no access" in ask("org/secret", token="hf_wrong")
    assert names(ask("org/secret", "weights", token=TOKEN)) == {"config.json", "model.safetensors"}
    add(hub, "org/gated", {})
    hub.gated.add("org/gated")
    answer = ask("org/gated")
    assert answer.startswith("ERROR ValueError model 'org/gated' is gated: ask for access at http://127.0.0.1:")
    assert names(ask("org/gated", token=TOKEN, download_dir=str(tmp_path / "elsewhere"))) == set(CONFIG)
    assert (tmp_path / "elsewhere" / "models--org--gated").is_dir()


def test_no_such_repository(ask):
    answer = ask("org/nothing", token=TOKEN)
    assert "Invalid repository ID or local directory specified: 'org/nothing': the hub has no such repository" in answer


def test_offline_and_not_cached_says_what_to_do(hub, ask):
    add(hub, "org/m", {"model.safetensors": b"w"})
    answer = ask("org/m", offline=True)
    assert re.match(r"ERROR ValueError model 'org/m' \(revision 'main'\) is not fully in the cache .*/home/hub", answer)
    assert "HF_HUB_OFFLINE is set. Unset it once" in answer
    assert names(ask("org/m")) == set(CONFIG)
    assert "HF_HUB_OFFLINE is set" in ask("org/m", "weights", offline=True)
    assert not hub.fetched() - set(CONFIG)


def test_network_that_does_not_answer(hub, ask):
    add(hub, "org/m", {})
    dead = "http://127.0.0.1:9"
    answer = ask("org/m", endpoint=dead)
    assert f"the hub at {dead} does not answer" in answer
    assert names(ask("org/m")) == set(CONFIG)
    assert names(ask("org/m", endpoint=dead)) == set(CONFIG)  # the cache is enough


def test_an_interrupted_download_is_resumed(hub, ask):
    add(hub, "org/m", {"model.safetensors": LARGE})
    hub.cut["model.safetensors"] = 1
    folder = ask("org/m", "weights").removeprefix("OK ")
    with open(f"{folder}/model.safetensors", "rb") as file:
        assert file.read() == LARGE
    asked = [how for method, path, how in hub.log if method == "GET" and path.endswith("/model.safetensors")]
    assert asked == [None, f"bytes={10 << 20}-"]


def test_a_node_fetches_each_file_once_whoever_asks(hub, ask):
    """Ranks and replicas of one node, or of nodes that share a file system, share the cache and its locks."""
    processes = 4
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = {name: name.encode() + LARGE for name in index["weight_map"].values()}
    add(hub, "org/m", {"model.safetensors.index.json": json.dumps(index).encode(), **shards})
    hub.hold[next(iter(shards))] = 2 * processes  # each asks for the index, and then for the shards
    with ThreadPoolExecutor(processes) as pool:
        answers = set(pool.map(lambda _: ask("org/m", "weights"), range(processes)))
    (answer,) = answers
    folder = answer.removeprefix("OK ")
    for name, content in shards.items():
        with open(f"{folder}/{name}", "rb") as file:
            assert file.read() == content
    sent = Counter(path.rpartition("/")[2] for method, path, _ in hub.log if method == "GET" and "/resolve/" in path)
    assert sent == {"config.json": 1, "model.safetensors.index.json": 1, **dict.fromkeys(shards, 1)}
