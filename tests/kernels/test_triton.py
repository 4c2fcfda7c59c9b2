"""Every implementation of every op against its reference, on poisoned memory: in the interpreter, and on a GPU."""

from __future__ import annotations

import copy
import os

import pytest
import torch

from shoal.kernels.ops.best_of_part import id_of
from shoal.kernels.registry import OPS, load_op

IMPLEMENTED = [name for name in OPS if "triton" in load_op(name).implementations]
DTYPES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}


def poisoned_empty(*args, **kwargs):
    tensor = torch.zeros(*args, **kwargs)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-99)


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def outputs(result, arguments):
    """What an op returned and what it wrote."""
    returned = result if isinstance(result, tuple) else (result,)
    return [t for t in (*returned, *arguments) if isinstance(t, torch.Tensor)]


def assert_same_best(found, expected) -> None:
    """Results of best_of_part: the ids, and the scores to their last bit but one.

    The noise is two logarithms, Triton's and torch's, which round differently (torch's own differ between CPU and GPU):
    on an H100 13% of the noise above 2 differs in its last bit, and none by more. bfloat16's cases have such a row.
    """
    assert torch.equal(id_of(found), id_of(expected))
    assert ((found >> 32) - (expected >> 32)).abs().max() <= 2


def check(name: str, dtype: str, device: str, monkeypatch) -> None:
    op = load_op(name)
    run = op.get("triton")
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    keep_wide = {
        "sample_rows": (1,),
        "best_of_part": (1,),
        "sample_nucleus": (1, 2),
        "sample_filtered": (1, 2),
        "qk_norm_rope_store": (4,),
        "decode_attention": (4,),
        "penalise": (0, 4),
    }.get(name, ())
    for case in op.cases(device):
        wanted = [cast(v, getattr(torch, dtype)) if i not in keep_wide else v for i, v in enumerate(case)]
        ours = copy.deepcopy(wanted)
        expected, found = outputs(op.reference(*wanted), wanted), outputs(run(*ours), ours)
        for a, b in zip(expected, found, strict=True):
            assert a.dtype == b.dtype
            if a.is_floating_point():
                torch.testing.assert_close(b, a, atol=DTYPES[dtype], rtol=DTYPES[dtype], equal_nan=True)
            elif name == "best_of_part" and a is expected[0]:
                assert_same_best(b, a)
            else:
                assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IMPLEMENTED)
def test_on_the_gpu(name, dtype, monkeypatch) -> None:
    check(name, dtype, "cuda", monkeypatch)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_interpreter.py")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", IMPLEMENTED)
def test_interpreted(name, dtype, monkeypatch) -> None:
    check(name, dtype, "cpu", monkeypatch)
