"""Products of many rows in Triton against the ops' references: odd shapes, small tiles.

In the interpreter by test_interpreter.py, and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.registry import load_op
from tests.kernels.test_triton_ops import DTYPES, INTERPRETED, TARGETS, _poisoned, close, normal  # noqa: F401

halves = [target for target in TARGETS if target.values[1] != torch.float32]  # tiles come by 16-bit values
everywhere = pytest.mark.parametrize(("device", "dtype"), halves)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [(1, 8, 8), (70, 136, 72), (65, 264, 40), (200, 64, 128)]  # rows, outputs, inputs


@pytest.fixture
def _small(monkeypatch) -> None:
    """Small tiles, and no size too small."""
    from shoal.kernels.triton import many_rows

    config = many_rows.ManyRowsConfig(block_m=64, block_n=64, block_k=32, group=2, warps=4, stages=3)
    monkeypatch.setattr(many_rows, "CONFIG", config)
    monkeypatch.setattr(many_rows, "_LEAST_ROWS", 1)
    monkeypatch.setattr(many_rows, "_LEAST_WORK", 1)


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """The rows of every call of `many_rows`."""
    from shoal.kernels.triton import linear

    rows: list[int] = []
    inner = linear.many_rows

    def noted(x, *arguments, **options):
        rows.append(len(x))
        return inner(x, *arguments, **options)

    monkeypatch.setattr(linear, "many_rows", noted)
    monkeypatch.setattr(linear, "rule", lambda *arguments, **options: None)  # no tiles for few rows
    return rows


@everywhere
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(shape, device, dtype, used) -> None:
    rows, outputs, size = shape
    wide = normal(rows, size + 8, device=device, dtype=dtype)
    weight = normal(2 * outputs, size, device=device, dtype=dtype, scale=size**-0.5, seed=1)
    op = load_op("gated_linear")
    for x in (wide[:, 8:], wide[:, :size].contiguous()):
        for name in ("silu", "gelu_pytorch_tanh"):
            close(op.get("triton")(x, weight, name), op.reference(x, weight, name), dtype)
    assert used == [rows] * 4


@everywhere
@pytest.mark.parametrize("shape", SHAPES)
def test_added(shape, device, dtype, monkeypatch) -> None:
    """The library adds the residual, in place."""
    from shoal.kernels.triton import linear

    monkeypatch.setattr(linear, "_LEAST_ADDED", 1)
    monkeypatch.setattr(linear, "rule", lambda *arguments, **options: None)
    rows, outputs, size = shape
    x, residual = (normal(rows, n, device=device, dtype=dtype, seed=n) for n in (size, outputs))
    weight = normal(outputs, size, device=device, dtype=dtype, scale=size**-0.5, seed=1)
    norm = normal(outputs, device=device, dtype=dtype, seed=2)
    op = load_op("linear_add_norm")
    expected = op.reference(x, weight, residual, norm, 1e-5)
    found = op.get("triton")(x, weight, residual, norm, 1e-5)
    for ours, wanted in zip(found, expected, strict=True):
        close(ours, wanted, dtype)
    assert found[1].data_ptr() == residual.data_ptr()


@pytest.mark.usefixtures("_small")
def test_what_it_does_not_take(used, monkeypatch) -> None:
    """Sizes and places that descriptors cannot have, and other dtypes, go the usual way."""
    from shoal.kernels.triton import linear

    monkeypatch.setattr(linear, "activation_and_mul", lambda x, name: x)
    monkeypatch.setattr(linear.functional, "linear", lambda x, weight: x)
    wide = torch.zeros(16, 200, dtype=torch.float16)
    for x, size in (
        (wide[:, 1:33], 32), (wide[:, :12], 12), (wide[:, :33:2], 17), (wide[:, :32].float(), 32), (wide[0, :32], 32),
        (torch.zeros(16, 204, dtype=torch.float16)[:, :32], 32),
    ):  # fmt: skip
        weight = torch.zeros(32, size, dtype=x.dtype)
        linear.gated_linear(x, weight, "silu")
    x = wide[:, :32]
    linear.gated_linear(x, torch.zeros(24, 32, dtype=x.dtype), "silu")
    assert used == []


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rows", [16384, 3000])
@pytest.mark.parametrize(("outputs", "size"), [(14336, 4096), (3072, 1024), (11008, 4096)])
def test_gated_of_real_size(outputs, size, rows, used) -> None:
    """As the rules have it: all of these are taken but few rows of the small one."""
    x = normal(rows, size, device="cuda", dtype=torch.bfloat16)
    weight = normal(2 * outputs, size, device="cuda", dtype=torch.bfloat16, scale=size**-0.5, seed=1)
    op = load_op("gated_linear")
    close(op.get("triton")(x, weight, "silu"), op.reference(x, weight, "silu"), torch.bfloat16)
    assert used == ([rows] if rows > 3000 or outputs > 4096 else [])


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rows", [16384, 5000])
@pytest.mark.parametrize("size", [14336, 4096])
def test_added_of_real_size(size, rows) -> None:
    x, residual = (normal(rows, n, device="cuda", dtype=torch.bfloat16, seed=n) for n in (size, 4096))
    weight = normal(4096, size, device="cuda", dtype=torch.bfloat16, scale=size**-0.5, seed=1)
    norm = normal(4096, device="cuda", dtype=torch.bfloat16, seed=2)
    op = load_op("linear_add_norm")
    expected = op.reference(x, weight, residual, norm, 1e-5)
    found = op.get("triton")(x, weight, residual, norm, 1e-5)
    for ours, wanted in zip(found, expected, strict=True):
        close(ours, wanted, torch.bfloat16)
    assert found[1].data_ptr() == residual.data_ptr()


@everywhere
def test_few_rows_leave_the_residual_as_it_was(device, dtype, monkeypatch) -> None:
    from shoal.kernels.triton import linear

    monkeypatch.setattr(linear, "_LEAST_ADDED", 9)
    monkeypatch.setattr(linear, "rule", lambda *arguments, **options: None)
    weight, norm = (normal(*shape, device=device, dtype=dtype, seed=1) for shape in ((16, 8), (16,)))
    for rows, wide in ((8, dtype), (9, torch.float32)):
        x, residual = (normal(rows, n, device=device, dtype=wide) for n in (8, 16))
        kept = residual.clone()
        load_op("linear_add_norm").get("triton")(x, weight.to(wide), residual, norm.to(wide), 1e-5)
        assert torch.equal(residual, kept)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_compiles_for_hopper(compiled_for_hopper) -> None:
    """The tiles that are used fit the chip, and the widest matrix instruction does them, without spills."""
    from shoal.kernels.triton.many_rows import many_rows

    x, weight = torch.zeros(256, 128, dtype=torch.bfloat16), torch.zeros(512, 128, dtype=torch.bfloat16)
    (kernel,) = compiled_for_hopper(many_rows, x, weight, "silu")
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in kernel.asm["ptx"]
    assert ".local" not in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 227 << 10
