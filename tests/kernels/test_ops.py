"""Each op's cases against an independent, naive formula; Op itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shoal.kernels.op import Op
from shoal.kernels.ops.activation import activation
from shoal.kernels.ops.activation_and_mul import activation_and_mul
from shoal.kernels.ops.layer_norm import layer_norm
from shoal.kernels.ops.paged_attention import paged_attention
from shoal.kernels.ops.rms_norm import rms_norm
from shoal.kernels.ops.rotary import rotary
from shoal.kernels.ops.store_kv import store_kv


def naive_rms_norm(x, weight, eps, residual):
    s = x.double() + (0 if residual is None else residual.double())
    rows = [row / math.sqrt(float((row * row).sum()) / row.numel() + eps) for row in s.reshape(-1, s.shape[-1])]
    normed = torch.stack(rows).view(s.shape) * weight.double() if rows else s
    return normed, s


def naive_layer_norm(x, weight, bias, eps):
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double() + bias.double()


def naive_rotary(query, key, cos, sin):
    def rotate(x):
        half = x.shape[-1] // 2
        pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
        turned = pairs * torch.complex(cos.double(), sin.double()).unsqueeze(1)
        return torch.cat((turned.real, turned.imag), -1)

    return rotate(query), rotate(key)


def naive_activation(x, name):
    x = x.double()
    if name == "relu":
        return x.clamp(min=0)
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_activation_and_mul(x, name):
    size = x.shape[-1] // 2
    return naive_activation(x[..., :size], name) * x[..., size:].double()


def naive_paged_attention(query, key_cache, value_cache, starts, lengths, tables, scale, *_):
    block_size, kv_heads = key_cache.shape[1:3]
    output = torch.zeros(query.shape, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        first, last = int(starts[row]), int(starts[row + 1])
        for token in range(first, last):
            seen = length - (last - token) + 1
            for head in range(query.shape[1]):
                kv = head // (query.shape[1] // kv_heads)
                slots = [(int(tables[row, p // block_size]), p % block_size, kv) for p in range(seen)]
                keys = torch.stack([key_cache[slot] for slot in slots]).double()
                values = torch.stack([value_cache[slot] for slot in slots]).double()
                weights = (keys @ query[token, head].double() * scale).softmax(0)
                output[token, head] = weights @ values
    return output


NAIVE: list[tuple[Op[..., Any], Any]] = [
    (rms_norm, naive_rms_norm),
    (layer_norm, naive_layer_norm),
    (rotary, naive_rotary),
    (activation_and_mul, naive_activation_and_mul),
    (activation, naive_activation),
    (paged_attention, naive_paged_attention),
]
CASES = [pytest.param(op, naive, n, id=f"{op.name}-{n}") for op, naive in NAIVE for n in range(len(op.cases()))]


@pytest.mark.parametrize(("op", "naive", "number"), CASES)
def test_reference_equals_naive_formula(op: Op[..., Any], naive: Any, number: int) -> None:
    arguments = op.cases()[number]
    expected, result = naive(*arguments), op(*op.cases()[number])
    if not isinstance(result, tuple):
        expected, result = (expected,), (result,)
    for want, got in zip(expected, result, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=op.tolerance, rtol=1e-5)


def test_ops_leave_their_inputs_alone() -> None:
    for op, _ in NAIVE:
        for arguments, pristine in zip(op.cases(), op.cases(), strict=True):
            op(*arguments)
            for used, fresh in zip(arguments, pristine, strict=True):
                if isinstance(used, torch.Tensor):
                    torch.testing.assert_close(used, fresh, atol=0, rtol=0, equal_nan=True)


def test_rms_norm_computes_in_float32_and_keeps_the_dtype() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its square overflows float16
    normed, same = rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-5)
    assert normed.dtype == torch.float16
    torch.testing.assert_close(normed, torch.ones_like(normed))
    assert same is x


@pytest.mark.parametrize("number", range(len(store_kv.cases())))
def test_store_kv_writes_the_slots_and_nothing_else(number: int) -> None:
    key, value, key_cache, value_cache, slots = store_kv.cases()[number]
    store_kv(key, value, key_cache, value_cache, slots)
    for new, cache in ((key, key_cache), (value, value_cache)):
        written = {slot: new[token] for token, slot in enumerate(slots.tolist()) if slot >= 0}
        for slot, content in enumerate(cache.flatten(0, 1)):
            if slot in written:
                assert torch.equal(content, written[slot])
            else:
                assert content.isnan().all()


def test_store_kv_converts_nothing_and_takes_strided_inputs() -> None:
    fused = torch.randn(3, 20)
    key, value = fused[:, 4:8].view(3, 2, 2), fused[:, 10:14].view(3, 2, 2)
    caches = torch.zeros(2, 2, 4, 2, 2)
    store_kv(key, value, caches[0], caches[1], torch.tensor([7, 0, 5]))
    assert torch.equal(caches[0].flatten(0, 1)[[7, 0, 5]], key)
    assert torch.equal(caches[1].flatten(0, 1)[[7, 0, 5]], value)


def test_decode_in_many_groups_equals_one_row_at_a_time() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 150, (40,), generator=generator).to(torch.int32)
    caches = torch.randn(2, 60, 8, 64, 64, generator=generator)  # 128 KiB a block: groups of at most 128 positions
    tables = torch.randint(0, 60, (40, 19), generator=generator).to(torch.int32)
    query = torch.randn(40, 64, 64, generator=generator)
    starts = torch.arange(41, dtype=torch.int32)
    together = paged_attention(query, *caches, starts, lengths, tables, 0.1, 1, 150)
    for row in range(40):
        alone = paged_attention(
            query[row : row + 1], *caches, starts[:2], lengths[row : row + 1], tables[row : row + 1], 0.1, 1, 150
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation 'gelo', known: relu"):
        activation(torch.zeros(1), "gelo")


def _double(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    """Times two."""
    return x * times


def _op() -> Op[..., torch.Tensor]:
    return Op(
        _double, cases=lambda device: [(torch.ones(2, device=device),)], implementations={"torch_neg": "torch:neg"}
    )


def test_op_calls_its_reference_until_told_otherwise() -> None:
    op = _op()
    assert op.name == "_double"
    assert op.__doc__ == "Times two."
    assert op(torch.ones(1), times=3).item() == 3
    op.use("torch_neg")
    assert op.active_name == "torch_neg"
    assert op(torch.ones(1)).item() == -1
    op.use("reference")
    assert op(*op.cases()[0]).tolist() == [2, 2]


def test_op_refuses_an_unknown_implementation() -> None:
    op = _op()
    with pytest.raises(
        ValueError, match=r"'_double' has no implementation 'torch_nag', known: reference, torch_neg; .*'torch_neg'"
    ):
        op.use("torch_nag")
    assert op.active_name == "reference"
