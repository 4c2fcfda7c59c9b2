"""Tests of Triton kernels that need no GPU: all of them in processes of their own, whose kernels are interpreted.

Triton decides that when a kernel is defined, so that this process, which compiles some, cannot do both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = (*sorted((TESTS / "kernels").glob("test_triton*.py")), TESTS / "workers" / "test_peers.py")
NAMES = "not who_cannot_share and not learn_each_others and not every_row_has"  # no kernel is in these


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is running now")
@pytest.mark.timeout(900)
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "not gpu", "-k", NAMES, "--durations=10"]
    result = subprocess.run([*command, *map(str, FILES)], env=environment, capture_output=True, text=True, check=False)
    print(result.stdout[-6000:])
    assert result.returncode == 0
    assert " passed" in result.stdout
    assert "run by test_interpreter.py" not in result.stdout, "some were left out"
