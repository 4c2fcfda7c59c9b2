"""What a cluster is started from, checked as far as that goes without a cloud, Docker or Kubernetes."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parent / "data"
LAUNCHER = ["cluster.yaml", "docker/cluster-onprem.yaml"]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
KUBERAY = ["docker/kuberay/raycluster.yaml", "docker/kuberay/rayjob.yaml"]
ALL = [*LAUNCHER, *DOCKERFILES, *KUBERAY, "docker/kuberay/storage.yaml", "docker/compose.yaml"]
HEALTH = {"initial_delay_ms", "period_ms", "timeout_ms", "failure_threshold"}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def load(name: str):
    return yaml.safe_load(read(name))


def check_environment(env: dict[str, str]) -> None:
    """What every node needs, whatever starts it."""
    assert {name for name in env if name.startswith("RAY_health_check_")} == {f"RAY_health_check_{k}" for k in HEALTH}
    assert float(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60  # Ray's default, 3, is less than a long answer takes
    assert env["HF_HOME"] == "/mnt/models"
    assert env["RAY_worker_niceness"] == "0"


# ---- ray up ------------------------------------------------------------------------------------------------------


def prepared(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    result = prepare_config(copy.deepcopy(config))
    validate_config(result)
    return result


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_cluster_file(name):
    result = prepared(load(name))
    assert result["cluster_name"] == "shoal"
    assert result["docker"]["container_name"]


@pytest.mark.parametrize(
    "change",
    [
        {"max_worker": 3},
        {"available_node_types": {"head": {"resources": {}, "node_config": {}, "cpus": 1}}},
        {"head_node_type": "none"},
        {"docker": {"imag": "x"}},
    ],
)
def test_ray_refuses_a_wrong_one(change):
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError, KeyError)):
        prepared(load("cluster.yaml") | change)


@pytest.mark.parametrize("name", LAUNCHER)
def test_clusters_of_ray_up(name):
    config = load(name)
    options = config["docker"]["run_options"]
    env = dict(option.removeprefix("-e ").split("=", 1) for option in options if option.startswith("-e "))
    check_environment(env)
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_AUTH_TOKEN_PATH"] == "/home/ray/secrets/ray_token"
    assert config["file_mounts"] == {"/home/ray/secrets": "./secrets"}
    stop_s = next(int(option.split("=")[1]) for option in options if option.startswith("--stop-timeout"))
    assert stop_s >= float(env["RAY_JOB_STOP_WAIT_TIME_S"])
    assert not any("shm-size" in option for option in options)  # Ray sizes it where nothing is said
    start = next(line for line in config["head_start_ray_commands"] if "ray start" in line)
    assert "--head" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert "$RAY_HEAD_IP:6379" in config["worker_start_ray_commands"][-1]
    no_gpu = "--num-gpus=0" in start or config["available_node_types"]["head"]["resources"]["GPU"] == 0
    assert no_gpu, "ranks would land on the head"
    for port in re.findall(r"-port=(\d+)", start):
        assert not 10002 <= int(port) <= 19999, "a port of Ray's workers"


# ---- images ------------------------------------------------------------------------------------------------------


def stages(name: str) -> list[str]:
    return re.findall(r"^FROM (\S+)", read(name), re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images(name):
    text = read(name)
    import ray

    assert {image.split("-")[0] for image in stages(name)} == {f"rayproject/ray:{ray.__version__}"}
    assert len(set(stages(name))) == 1, "the wheel is built where it will run"
    assert "-py311-" in stages(name)[0]
    assert not re.search(r":latest|nightly|-gpu\b", text)
    assert re.findall(r"^USER (.*)", text, re.MULTILINE)[-1] == "1000:100"
    assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in text
    assert "HEALTHCHECK" in text
    assert "RAY_AUTH_MODE=token" in text
    assert not re.search(r"TOKEN=|hf_[A-Za-z0-9]{8}|ARG .*(?i:token|secret)", text)
    assert not re.search(r"(?i)\.safetensors|\.gguf|snapshot_download|huggingface-cli|hf download", text), "no weights"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_pins_are_those_of_the_project(name):
    import ray

    pins = dict(re.findall(r"^(\w+)==([\w.]+)", read("constraints.txt"), re.MULTILINE))
    text = read(name)
    assert f"ray=={ray.__version__}" in text
    for found in re.findall(r"torch==([\d.]+)", text):
        assert found == pins["torch"]
    project = tomllib.loads(read("pyproject.toml"))["project"]
    for other in (*LAUNCHER, *KUBERAY, "docker/compose.yaml"):
        for image in re.findall(r"shoal:([\w.-]+)", read(other)):
            assert image.startswith(f"{project['version']}-ray{ray.__version__}-py311-"), other


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_images_copy_passes_dockerignore(name):
    """.dockerignore lets through what it names, no more: a file that is copied must be named in it."""
    allowed = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert read(".dockerignore").splitlines()[1] == "*"
    for line in re.findall(r"^COPY (?!.*--from)(.*)", read(name), re.MULTILINE):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert source in allowed
            assert (ROOT / source).exists()
    assert not allowed & {"secrets", "data", ".cache", ".venv", "tests"}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name):
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed on this platform")
    done = subprocess.run([program, "--no-color", name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert not done.stdout


# ---- compose -----------------------------------------------------------------------------------------------------


def test_compose():
    config = load("docker/compose.yaml")
    jsonschema.Draft201909Validator(json.loads((DATA / "compose-schema.json").read_text())).validate(config)
    assert set(config["services"]) == {"head", "worker", "gpu-worker"}
    for service in config["services"].values():
        env = service["environment"]
        check_environment(env)
        assert env["RAY_AUTH_MODE"] == "token"
        assert env["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert int(service["stop_grace_period"].rstrip("s")) >= float(env["RAY_JOB_STOP_WAIT_TIME_S"])
        assert "models:/mnt/models" in service["volumes"]
        assert service["shm_size"]
        assert "ALL" in service["cap_drop"]
    assert config["services"]["head"]["ports"] == ["127.0.0.1:8265:8265"]
    assert "--num-gpus=0" in config["services"]["head"]["command"]
    assert config["secrets"]["ray_token"] == {"file": "../secrets/ray_token"}


def test_compose_schema_sees_a_wrong_file():
    config = load("docker/compose.yaml")
    config["services"]["head"]["shmsize"] = "1gb"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft201909Validator(json.loads((DATA / "compose-schema.json").read_text())).validate(config)


# ---- KubeRay -----------------------------------------------------------------------------------------------------


def kuberay_errors(manifest) -> list[str]:
    schema = yaml.safe_load((DATA / "kuberay-schema.yaml").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)]


def cluster_of(name: str):
    manifest = load(name)
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def groups(cluster) -> list:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_the_manifest(name):
    assert not kuberay_errors(load(name))


def test_kuberay_schema_sees_wrong_ones():
    good = load("docker/kuberay/raycluster.yaml")
    for path, value in (
        (("spec", "authOption"), {"mode": "token"}),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "rayStartParams", "num-gpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "terminationGracePeriodSeconds"), "180"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"), "16 GiB"),
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 3),
    ):
        bad = copy.deepcopy(good)
        place = bad
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        assert kuberay_errors(bad), path


def test_both_manifests_start_the_same_cluster():
    assert cluster_of(KUBERAY[0]) == cluster_of(KUBERAY[1])


def test_kuberay_cluster():
    cluster = cluster_of(KUBERAY[0])
    import ray

    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] < 2**31 - 1
    claims = {claim["metadata"]["name"] for claim in yaml.safe_load_all(read("docker/kuberay/storage.yaml"))}
    for group in groups(cluster):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        check_environment(env)
        assert pod["terminationGracePeriodSeconds"] >= float(env["RAY_JOB_STOP_WAIT_TIME_S"]) + 10  # stop_jobs.py's
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounts["/mnt/models"]]["persistentVolumeClaim"]["claimName"] in claims
        token = next(entry for entry in container["env"] if entry["name"] == "HF_TOKEN")
        assert token["valueFrom"]["secretKeyRef"]["optional"] is True
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def job_of(words: list[str]):
    """What `shoal run-batch` makes of a command line."""
    from shoal.driver.jobs.commands.run_batch import add_arguments, job_config

    program, command, *arguments = words
    assert (program, command) == ("shoal", "run-batch")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return job_config(parser.parse_args(arguments))


def test_the_job_is_a_command_that_shoal_takes():
    spec = load(KUBERAY[1])["spec"]
    job = job_of(shlex.split(spec["entrypoint"]))
    assert job.engine.wait_for_nodes  # no GPU is there before the job asks for one
    assert job.engine.device == "cuda"
    assert job.output.startswith("/mnt/data/")  # a volume that outlives the cluster: a retry is a new one
    assert spec["backoffLimit"] > 0


# ---- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_no_secret_is_written_in(name):
    text = read(name)
    assert not re.search(r"\b(hf_[A-Za-z0-9]{8,}|AKIA[0-9A-Z]{16}|[0-9a-f]{64})\b", text)
    assert not re.search(r"(RAY_AUTH_TOKEN|HF_TOKEN)\s*[=:]\s*['\"]?\w", text)


def test_secrets_stay_out_of_git_images_and_uploads():
    for name in (".gitignore", ".rayignore"):
        lines = {line.strip("/") for line in read(name).splitlines()}
        assert {"secrets", "data"} <= lines
    done = subprocess.run(["git", "check-ignore", "-q", "secrets/ray_token"], cwd=ROOT)
    assert done.returncode in (0, 128)  # 128: no git checkout


def test_every_manifest_is_checked():
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "docker").rglob("*") if path.is_file()}
    found = {name for name in found if "__pycache__" not in name and not name.endswith(".py")}
    assert found | {"cluster.yaml"} == set(ALL)
    assert os.access(ROOT / "docker/stop_jobs.py", os.R_OK)


@pytest.mark.parametrize("name", ["docs/deploying.md"])
def test_the_lines_of_the_page(name):
    """Every job it sends is one that Shoal takes, by flags of `ray job submit`, and every file it names is there."""
    blocks = re.findall(r"^```sh\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    sent = [shlex.split(line, comments=True) for line in lines if "shoal run-batch" in line]
    assert len(sent) >= 4
    for words in sent:
        start = words.index("--")
        before = words[words.index("ray") : start]
        assert before[:5] == ["ray", "job", "submit", "--address", "http://127.0.0.1:8265"]
        assert before[5::2] in ([], ["--submission-id"])
        assert job_of(words[start + 1 :]).input
    for found in re.findall(r"(?:docker/[\w./-]+\w|cluster\.yaml|tests/[\w./-]+\w)", read(name)):
        assert (ROOT / found).exists(), found
