"""prepare_decode and append_decode: what stands before and after the model in a decode step, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.op import Op


def _prepare_decode(
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
    """Fill a decode step's inputs from the persistent batch (see workers/state.py): the newest token of each row.

    rows int64 [n], places in the batch, -1 for padding. Written: input_ids, positions, slot_mapping int64 [n];
    seq_lens int32 [n]; tables_out int32 [n, blocks], each row's blocks as far as it has tokens; and what sampling asks
    of each row: temperatures_out float32 [n], streams_out and generated (tokens so far) int64 [n]. Padding and ended
    rows get seq_len 0 and slot -1, so they read and write no cache; padding is greedy.
    """
    real = rows >= 0
    place = rows.clamp(min=0)
    position = torch.where(real, num_tokens[place].long() - 1, 0)
    live = real & ~ended[place]
    input_ids.copy_(torch.where(real, token_ids[place, position].long(), 0))
    positions.copy_(position)
    block = block_tables[place, position // block_size].long()
    slot_mapping.copy_(torch.where(live, block * block_size + position % block_size, -1))
    seq_lens.copy_(torch.where(live, position + 1, 0))
    needed = torch.arange(tables_out.shape[1], device=rows.device) * block_size < seq_lens.unsqueeze(1)
    tables_out.copy_(torch.where(needed, block_tables[place, : tables_out.shape[1]], tables_out))
    temperatures_out.copy_(torch.where(real, temperatures[place], 0.0))
    streams_out.copy_(torch.where(real, streams[place], 0))
    generated.copy_(torch.where(real, (num_tokens[place] - num_prompt_tokens[place]).long(), 0))


def _append_decode(
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
    """Append sampled int64 [n] to the rows (int64 [n], -1 for padding) that have not ended, and note who ends by it.

    stop_ids int64 [max rows, k], -1 where shorter; a row ends on one of them once it has min_tokens generated ones.
    out int32 [n]: the token, -1 for padding and rows that had ended.
    """
    live = (rows >= 0) & ~ended[rows.clamp(min=0)]
    out.copy_(torch.where(live, sampled, -1))
    place, chosen = rows[live], sampled[live]
    token_ids[place, num_tokens[place].long()] = chosen.to(token_ids.dtype)
    num_tokens[place] += 1
    enough = num_tokens[place] - num_prompt_tokens[place] >= min_tokens[place]
    ended[place] = (stop_ids[place] == chosen.unsqueeze(1)).any(dim=1) & enough


def _batch(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "token_ids": torch.randint(0, 99, (6, 40), generator=generator, dtype=torch.int32).to(device),
        "num_tokens": torch.tensor([3, 17, 1, 39, 8, 16], dtype=torch.int32, device=device),
        "num_prompt_tokens": torch.tensor([1, 17, 1, 30, 8, 2], dtype=torch.int32, device=device),
        "block_tables": torch.randperm(60, generator=generator)[: 6 * 10].view(6, 10).to(torch.int32).to(device),
        "ended": torch.tensor([False, False, True, False, False, False], device=device),
        "rows": torch.tensor([5, -1, 0, 2, 3], device=device),
    }


def _prepare_cases(device: str) -> Iterator[tuple[Any, ...]]:
    batch = _batch(device)
    ids = [torch.full((5,), -7, dtype=torch.int64, device=device) for _ in range(3)]
    seq_lens = torch.full((5,), -7, dtype=torch.int32, device=device)
    tables = torch.full((5, 10), -7, dtype=torch.int32, device=device)
    names = ("rows", "token_ids", "num_tokens", "block_tables", "ended")
    temperatures = torch.tensor([0.0, 0.6, 1.0, 0.25, 2.0, 0.5], device=device)
    streams = torch.arange(6, device=device) * 0x1E3779B97F4A7C15
    found = [torch.full((5,), -7.0, device=device)]
    found += [torch.full((5,), -7, dtype=torch.int64, device=device) for _ in range(2)]
    wishes = batch["num_prompt_tokens"], temperatures, streams, *found
    yield *(batch[name] for name in names), 4, *ids, seq_lens, tables, *wishes


def _append_cases(device: str) -> Iterator[tuple[Any, ...]]:
    batch = _batch(device)
    sampled = torch.tensor([50, 51, 52, 53, 54], device=device)
    min_tokens = torch.tensor([9, 0, 0, 0, 0, 0], device=device)
    stop_ids = torch.tensor([[52, -1], [-1, -1], [-1, -1], [7, 54], [-1, -1], [50, -1]], device=device)
    out = torch.full((5,), -7, dtype=torch.int32, device=device)
    yield (
        batch["rows"], sampled, batch["token_ids"], batch["num_tokens"], batch["num_prompt_tokens"], min_tokens,
        stop_ids, batch["ended"], out,
    )  # fmt: skip


prepare_decode = Op(
    _prepare_decode,
    cases=_prepare_cases,
    implementations={"triton": "shoal.kernels.triton.decode_step:prepare_decode"},
    tolerance=0,
)
append_decode = Op(
    _append_decode,
    cases=_append_cases,
    implementations={"triton": "shoal.kernels.triton.decode_step:append_decode"},
    tolerance=0,
)
