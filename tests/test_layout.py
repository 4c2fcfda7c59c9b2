"""The structure of the tree: who imports whom, what stays out of a process, sizes. Read from the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("driver", "workers", "kernels")

# shoal/ itself is not walked: its three links would show every file twice.
LAYER_FILES = {layer: sorted((ROOT / layer).rglob("*.py")) for layer in LAYERS}
ALL_FILES = [
    *(path for files in LAYER_FILES.values() for path in files),
    *sorted((ROOT / "shoal").glob("*.py")),
    *(path for folder in ("examples", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))),
]

# What may be imported beyond the standard library; inside functions as well.
ALLOWED = {
    "driver": {"shoal", "ray", "pydantic", "numpy", "tokenizers", "transformers", "huggingface_hub", "tqdm", "gguf"}
    | {"fsspec", "pyarrow", "jinja2", "yaml", "orjson", "plotly"},
    "workers": {"shoal", "torch", "numpy", "transformers", "huggingface_hub", "pydantic", "safetensors", "gguf", "tqdm"}
    | {"ray", "tokenizers"},
    "kernels": {"shoal", "torch", "triton", "numpy"},
}
# Programs that the driver starts in processes of their own, to run another engine there.
PEERS = ROOT / "driver" / "bench" / "peers"
ALLOWED_IN_PEERS = {"torch", "transformers", "vllm"}
HEAVY = {"torch", "transformers", "triton"}


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """Full name and line of everything imported, relative imports resolved; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [module.rsplit(".", node.level)[0], base]))
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def runs_at_import(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those of functions, nor those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(child, ast.If) and is_type_checking(child)
        ):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from runs_at_import(child)


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    return ".".join(["shoal", *relative.parts]) if relative.parts[0] in LAYERS else ".".join(relative.parts)


def imports_at_import_time(path: Path) -> list[str]:
    statements = ast.Module(body=list(runs_at_import(ast.parse(path.read_text()))), type_ignores=[])
    return [name for name, _ in imports(statements, module_name(path))]


def layer_imports(layer: str) -> Iterator[tuple[Path, str, str]]:
    """(file, "path:line", imported name) of a layer."""
    for path in LAYER_FILES[layer]:
        for name, line in imports(ast.parse(path.read_text()), module_name(path)):
            yield path, f"{path.relative_to(ROOT)}:{line}", name


def test_every_layer_is_seen():
    assert all(LAYER_FILES.values()), f"no sources under one of {LAYERS}"


@pytest.mark.parametrize(("layer", "above"), [("kernels", ("driver", "workers")), ("workers", ("driver",))])
def test_no_import_goes_up(layer, above):
    forbidden = {f"shoal.{name}" for name in above}
    found = [f"{at} {name}" for _, at, name in layer_imports(layer) if ".".join(name.split(".")[:2]) in forbidden]
    assert not found, f"{layer} may not know {above}"


@pytest.mark.parametrize("layer", ["workers", "kernels"])
def test_lower_layers_do_not_use_the_package_front(layer):
    """`from shoal import LLM` would be a way around the arrows."""
    found = [f"{at} {name}" for _, at, name in layer_imports(layer) if name.startswith("shoal.")]
    assert not [line for line in found if line.split()[1].split(".")[1] not in LAYERS]


@pytest.mark.parametrize("layer", LAYERS)
def test_only_named_packages_are_used(layer):
    found = []
    for path, at, name in layer_imports(layer):
        allowed = ALLOWED_IN_PEERS if path.is_relative_to(PEERS) else ALLOWED[layer]
        if name.split(".")[0] not in allowed | sys.stdlib_module_names:
            found.append(f"{at} {name}")
    assert not found, f"{layer} may import {sorted(ALLOWED[layer])}; say why in docs/dependencies.md"


def test_ray_is_in_one_file_of_workers():
    found = [
        at for path, at, name in layer_imports("workers") if name.split(".")[0] == "ray" and path.name != "actor.py"
    ]
    assert not found


def test_kernels_know_only_tensors_and_each_other():
    found = [f"{at} {name}" for _, at, name in layer_imports("kernels") if name.startswith("shoal.")]
    assert not [line for line in found if not line.split()[1].startswith("shoal.kernels")]


def file_of(name: str) -> Path | None:
    """The source of module `name`, or of the module that holds the object `name`."""
    parts = name.split(".")[1:]
    for length in (len(parts), len(parts) - 1):
        base = ROOT.joinpath(*parts[:length])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if length > 0 and path.is_file():
                return path
    return None


def test_driver_imports_only_torch_free_modules():
    """Follows what every file of driver/ imports at import time, through workers/, to the end."""
    found: list[str] = []
    seen: set[Path] = set()
    todo = [(path, str(path.relative_to(ROOT))) for path in LAYER_FILES["driver"]]
    while todo:
        path, chain = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports_at_import_time(path):
            if name.split(".")[0] in HEAVY:
                found.append(f"{chain} -> {name}")
            elif name.startswith("shoal.") and (target := file_of(name)) is not None:
                todo.append((target, f"{chain} -> {target.relative_to(ROOT)}"))
    assert not found
    assert any(path.is_relative_to(ROOT / "workers") for path in seen), "the walk no longer reaches workers/"


@pytest.mark.parametrize(
    "statement",
    [
        "import shoal",
        "import shoal.driver.actor",
        "from shoal import SamplingParams",
        "from shoal.data import Generate",
    ],
)
def test_process_stays_free_of_torch(statement):
    code = f"{statement}\nimport sys\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_importing_shoal_leaves_ray_alone():
    """The front of the package is lazy: its import is cheap and starts nothing."""
    code = "import shoal, shoal.data, sys; print(sorted({'ray', 'pydantic'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


def test_public_names_are_sorted_and_resolve():
    code = "import shoal; [getattr(shoal, name) for name in shoal.__all__]; print(*shoal.__all__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert result.returncode == 0, result.stderr
    names = result.stdout.split()
    assert names == sorted(names)
    assert len(names) == len(set(names))
    assert {"LLM", "SamplingParams"} <= set(names)


def test_kernels_is_a_namespace():
    """With an __init__.py, the repository's root on sys.path would hide Hugging Face's `kernels` from transformers."""
    assert not list((ROOT / "kernels").rglob("__init__.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_package_links(layer):
    link = ROOT / "shoal" / layer
    assert link.is_symlink()
    assert link.readlink() == Path("..", layer)


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_file_is_short_and_plain(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split it"
    tree = ast.parse(text)
    bare = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not bare, f"bare except in line {bare}"
    if path.is_relative_to(ROOT / "kernels" / "triton"):
        return
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions]
    assert not [(name, size) for name, size in sizes if size > 60], "split them"
