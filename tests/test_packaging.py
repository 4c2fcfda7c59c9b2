"""What is built from this tree, installed into an empty folder: real files in place of links, data files, imports."""

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("driver", "workers", "kernels")
DEPLOYING = ("cluster.yaml", "constraints.txt", ".dockerignore", "docker", "docs", "examples")
PARTS = ("shoal", *LAYERS, "pyproject.toml", "README.md", "MANIFEST.in", *DEPLOYING)


def run(*command: str, cwd: Path, **extra: str) -> str:
    # Without the caller's PYTHONPATH: what is imported must come from where the test says.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | extra
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def expected_files() -> set[str]:
    """Path inside the package of every source file, and of the data files."""
    sources = {f"shoal/{path.relative_to(ROOT)}" for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    return sources | {f"shoal/{path.name}" for path in (ROOT / "shoal").glob("*.py")} | {"shoal/py.typed"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """A wheel and an sdist of a copy of the tree, so that building leaves nothing behind in it."""
    tree = tmp_path_factory.mktemp("tree") / "shoal"
    tree.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)
    out = tree.parent / "out"
    backend = "from setuptools import build_meta; build_meta.build_sdist({0!r}); build_meta.build_wheel({0!r})"
    run(sys.executable, "-c", backend.format(str(out)), cwd=tree)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_wheel_holds_every_source_as_a_real_file(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        members = [info for info in wheel.infolist() if ".dist-info/" not in info.filename]
    assert {info.filename for info in members if not info.is_dir()} == expected_files()
    assert not [info.filename for info in members if stat.S_ISLNK(info.external_attr >> 16)]


def test_sdist_holds_every_source_as_a_real_file(built):
    with tarfile.open(built["sdist"]) as sdist:
        members = sdist.getmembers()
    inside = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert expected_files() <= inside
    assert {"pyproject.toml", "README.md"} <= inside
    for name in DEPLOYING:
        paths = [ROOT / name, *(ROOT / name).rglob("*")]
        files = {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}
        assert files, name
        assert files <= inside
    assert not [member.name for member in members if member.issym() or member.islnk()]


SEEN_FROM_OUTSIDE = """
import sys
target, site_packages = sys.argv[1:]
sys.path[:0] = [target]
sys.path.append(site_packages)
import importlib.metadata, importlib.resources
import shoal
import shoal.driver.config
import shoal.workers.plan
from shoal import SamplingParams
assert SamplingParams(max_tokens=3).max_tokens == 3
assert importlib.resources.files("shoal").joinpath("py.typed").read_bytes() == b""
assert importlib.metadata.version("shoal")
modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "shoal"}
strays = {name: where for name, module in modules.items() if (where := getattr(module, "__file__", None))
          and not where.startswith(target)}
assert not strays, strays
print(len(modules))
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_package_works_far_from_the_tree(built, kind, tmp_path):
    target = tmp_path / "target"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "--target", str(target), str(built[kind]), cwd=tmp_path)
    links = [str(path) for path in (target / "shoal").rglob("*") if path.is_symlink()]
    assert not links
    # -S leaves out the .pth files, and with them the editable install that tests run from.
    site_packages = sysconfig.get_paths()["purelib"]
    count = run(sys.executable, "-I", "-S", "-c", SEEN_FROM_OUTSIDE, str(target), site_packages, cwd=tmp_path)
    assert int(count) > 3
    if kind == "wheel":
        for arguments, expected in ((["--version"], "shoal "), (["run-batch", "--help"], "usage: shoal run-batch")):
            program = (str(target / "bin" / "shoal"), *arguments)
            assert run(*program, cwd=tmp_path, PYTHONPATH=str(target)).startswith(expected)
