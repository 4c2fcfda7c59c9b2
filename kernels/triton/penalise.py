"""penalise in Triton: counts are read, and logits where a count is not 0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 4096


@triton.jit
def penalise_kernel(
    logits_ptr, rows_ptr, counts_ptr, slots_ptr, penalties_ptr,
    vocab, logits_stride, counts_stride, penalties_stride, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of one row."""
    i = tl.program_id(0).to(tl.int64)
    logits_ptr += tl.load(rows_ptr + i) * logits_stride
    counts_ptr += tl.load(slots_ptr + i) * counts_stride
    repetition = tl.load(penalties_ptr + i)
    frequency = tl.load(penalties_ptr + penalties_stride + i)
    presence = tl.load(penalties_ptr + 2 * penalties_stride + i)
    offs = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    counts = tl.load(counts_ptr + offs, mask=offs < vocab, other=0)
    seen = counts > 0
    logits = tl.load(logits_ptr + offs, mask=seen, other=0.0)
    logits = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
    generated = counts >> 1
    logits = logits - frequency * generated.to(tl.float32)
    logits = logits - tl.where(generated > 0, presence, 0.0)
    tl.store(logits_ptr + offs, logits, mask=seen)


def penalise(
    logits: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, slots: torch.Tensor, penalties: torch.Tensor
) -> None:
    """See kernels/ops/penalise.py."""
    vocab = logits.shape[1]
    assert logits.dtype == penalties.dtype == torch.float32
    assert logits.stride(1) == counts.stride(1) == 1
    assert penalties.shape[1] == 1 or penalties.stride(1) == 1
    if not len(rows):
        return
    penalise_kernel[(len(rows), triton.cdiv(vocab, _CHUNK))](
        logits,
        rows,
        counts,
        slots,
        penalties,
        vocab,
        logits.stride(0),
        counts.stride(0),
        penalties.stride(0),
        CHUNK=_CHUNK,
        num_warps=8,
        enable_fp_fusion=False,  # product and difference are rounded one by one, as torch does
    )
