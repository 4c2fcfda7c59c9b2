"""sample_filtered in Triton where a small top_k bounds every row: the best ids by top_ids.py, and a draw from them.

They are in order, so a running sum of their mass says where top_p is reached. Mass is counted in integers, see
selection.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.ops.sampling import sample_filtered as op
from shoal.kernels.triton.noise import gumbel, words_of_ids
from shoal.kernels.triton.selection import NO_ID, mass_of, select, value_of
from shoal.kernels.triton.top_ids import NO_KEY, ordered_keys

_INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["vocab"])
def draw_kernel(
    keys_ptr, top_k_ptr, top_p_ptr, streams_ptr, positions_ptr, out_ptr, vocab, k, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a row: keys [n, k], best first -> the id that is drawn, int64 [n]."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + row * k + offs, mask=offs < k, other=NO_KEY)
    ids = (vocab - 1 - (keys & 0xFFFFFFFF)).to(tl.int32)
    in_top_k = (keys != NO_KEY) & (offs < tl.load(top_k_ptr + row))
    scores = tl.where(in_top_k, value_of(keys >> 32), -_INF)
    mass = mass_of(scores, tl.max(scores, 0))
    top_p = tl.load(top_p_ptr + row)
    needed = tl.where(top_p < 1, top_p * tl.sum(mass, 0).to(tl.float64), _INF)
    kept = (scores > -_INF) & ((tl.cumsum(mass, 0) - mass).to(tl.float64) < needed)
    stream = tl.load(streams_ptr + row).to(tl.uint64, bitcast=True)
    noise = gumbel(words_of_ids(ids, stream, tl.load(positions_ptr + row)))
    drawn = tl.where(kept, scores + noise, -_INF)
    chosen = tl.min(tl.where(kept & (drawn == tl.max(drawn, 0)), ids, NO_ID), 0)
    tl.store(out_ptr + row, tl.where(chosen == NO_ID, 0, chosen).to(tl.int64))


def sample_filtered(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    log_min_p: torch.Tensor | None,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    max_top_k: int | None = None,
) -> torch.Tensor:
    """See kernels/ops/sampling.py. Rows whose top_k nothing bounds take the reference, which orders the vocabulary."""
    rows, vocab = logits.shape
    if max_top_k is None:
        return op.reference(logits, temperature, log_min_p, top_k, top_p, streams, positions)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    temperature, top_k, top_p = temperature.contiguous(), top_k.contiguous(), top_p.contiguous()
    streams, positions = streams.contiguous(), positions.contiguous()  # any may be a column of a table
    log_min_p = None if log_min_p is None else log_min_p.contiguous()
    k = min(max_top_k, vocab)
    keys = ordered_keys(select(logits, temperature, log_min_p, k), logits, temperature, k)
    block = max(32, triton.next_power_of_2(k))
    draw_kernel[(rows,)](keys, top_k, top_p, streams, positions, out, vocab, k, BLOCK=block, num_warps=4)
    return out
