"""What the tests of Triton kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def _compile(function, arguments: tuple, options: dict) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    values = dict(zip(function.arg_names, arguments, strict=False)) | options
    short = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16"}
    short |= {torch.int32: "i32", torch.int64: "i64", torch.int8: "i8", torch.bool: "i1"}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        value = values.pop(parameter.name)
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            signature[parameter.name], aligned = f"tensordesc<{short[value.base.dtype]}{value.block_shape}>", False
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = "*" + short[value.dtype], value.data_ptr() % 16 == 0
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            aligned = special and value % 16 == 0
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=values)


@pytest.fixture
def compiled_for_hopper(monkeypatch) -> Callable[..., list[Any]]:
    """(run, *arguments) -> the kernels that run(*arguments) would launch, compiled: that takes no GPU."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple, dict]] = []

    def record(self, *arguments, grid, warmup, **options) -> None:
        launches.append((self, arguments, options))

    def compiled(run: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        launches.clear()
        run(*arguments, **options)
        assert launches
        return [_compile(*launch) for launch in launches]

    monkeypatch.setattr(JITFunction, "run", record)
    return compiled
