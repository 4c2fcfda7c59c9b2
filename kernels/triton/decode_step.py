"""prepare_decode and append_decode in Triton: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.triton.dependent import launch_options, wait_for_previous


@triton.jit
def prepare_decode_kernel(
    rows_ptr, token_ids_ptr, num_tokens_ptr, tables_ptr, ended_ptr,
    input_ids_ptr, positions_ptr, slots_ptr, seq_lens_ptr, tables_out_ptr,
    num_prompt_ptr, temperatures_ptr, streams_ptr, temperatures_out_ptr, streams_out_ptr, generated_ptr,
    tokens_stride, table_stride, out_stride, block_size, BLOCKS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    if row < 0:
        tl.store(input_ids_ptr + i, 0)
        tl.store(positions_ptr + i, 0)
        tl.store(slots_ptr + i, -1)
        tl.store(seq_lens_ptr + i, 0)
        tl.store(temperatures_out_ptr + i, 0.0)
        tl.store(streams_out_ptr + i, 0)
        tl.store(generated_ptr + i, 0)
        return
    position = tl.load(num_tokens_ptr + row).to(tl.int64) - 1
    tl.store(temperatures_out_ptr + i, tl.load(temperatures_ptr + row))
    tl.store(streams_out_ptr + i, tl.load(streams_ptr + row))
    tl.store(generated_ptr + i, position + 1 - tl.load(num_prompt_ptr + row))
    tl.store(input_ids_ptr + i, tl.load(token_ids_ptr + row * tokens_stride + position).to(tl.int64))
    tl.store(positions_ptr + i, position)
    if tl.load(ended_ptr + row) != 0:
        tl.store(slots_ptr + i, -1)
        tl.store(seq_lens_ptr + i, 0)
        return
    table = tables_ptr + row * table_stride
    block = tl.load(table + position // block_size).to(tl.int64)
    tl.store(slots_ptr + i, block * block_size + position % block_size)
    tl.store(seq_lens_ptr + i, (position + 1).to(tl.int32))
    needed = position // block_size + 1
    offs = tl.arange(0, BLOCKS)
    for first in range(0, needed, BLOCKS):
        mask = first + offs < needed
        blocks = tl.load(table + first + offs, mask=mask)
        tl.store(tables_out_ptr + i * out_stride + first + offs, blocks, mask=mask)


@triton.jit
def append_decode_kernel(
    rows_ptr, sampled_ptr, token_ids_ptr, num_tokens_ptr, num_prompt_ptr, min_tokens_ptr, stop_ids_ptr, ended_ptr,
    out_ptr, tokens_stride, num_stop_ids, STOPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    tl.store(out_ptr + i, -1)
    if row >= 0:
        if tl.load(ended_ptr + row) == 0:
            token = tl.load(sampled_ptr + i)
            length = tl.load(num_tokens_ptr + row)
            tl.store(out_ptr + i, token.to(tl.int32))
            tl.store(token_ids_ptr + row * tokens_stride + length, token.to(tl.int32))
            tl.store(num_tokens_ptr + row, length + 1)
            offs = tl.arange(0, STOPS)
            stops = tl.load(stop_ids_ptr + row * num_stop_ids + offs, mask=offs < num_stop_ids, other=-1)
            hit = tl.max((stops == token).to(tl.int32), 0)
            generated = length + 1 - tl.load(num_prompt_ptr + row)
            if hit != 0:
                if generated >= tl.load(min_tokens_ptr + row):
                    tl.store(ended_ptr + row, 1)


def prepare_decode(
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    block_tables: torch.Tensor,
    ended: torch.Tensor,
    block_size: int,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
    tables_out: torch.Tensor,
    num_prompt_tokens: torch.Tensor,
    temperatures: torch.Tensor,
    streams: torch.Tensor,
    temperatures_out: torch.Tensor,
    streams_out: torch.Tensor,
    generated: torch.Tensor,
) -> None:
    """See kernels/ops/decode_step.py."""
    prepare_decode_kernel[(rows.shape[0],)](
        rows,
        token_ids,
        num_tokens,
        block_tables,
        ended.view(torch.int8),
        input_ids,
        positions,
        slot_mapping,
        seq_lens,
        tables_out,
        num_prompt_tokens,
        temperatures,
        streams,
        temperatures_out,
        streams_out,
        generated,
        token_ids.stride(0),
        block_tables.stride(0),
        tables_out.stride(0),
        block_size,
        BLOCKS=256,
        num_warps=1,
    )


def append_decode(
    rows: torch.Tensor,
    sampled: torch.Tensor,
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    num_prompt_tokens: torch.Tensor,
    min_tokens: torch.Tensor,
    stop_ids: torch.Tensor,
    ended: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See kernels/ops/decode_step.py."""
    append_decode_kernel[(rows.shape[0],)](
        rows,
        sampled,
        token_ids,
        num_tokens,
        num_prompt_tokens,
        min_tokens,
        stop_ids,
        ended.view(torch.int8),
        out,
        token_ids.stride(0),
        stop_ids.shape[1],
        STOPS=triton.next_power_of_2(stop_ids.shape[1]),
        num_warps=1,
        **launch_options(rows.device),
    )
