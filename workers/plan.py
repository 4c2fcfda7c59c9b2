"""What crosses between the driver and the ranks: the step's plan, and what the step produced.

Both are plain data (numpy arrays and small Python values) with a binary frame form that never involves pickle: an
8-byte header length, a JSON header (scalars, and dtype and shape of each array), then the arrays' bytes in order.
This module is torch-free, so the driver imports it.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
_LENGTH = struct.Struct("<Q")
EPOCH_SHIFT = 32  # a step's id is the epoch of its ranks, shifted by this, and a count: late answers are told by it


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What the sampler needs to know about one row; everything already validated by the driver's side."""

    temperature: float = 1.0  # 0.0 means greedy
    top_k: int = 0  # 0 means off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stream: int = 0  # unsigned 64-bit key of the row's random stream
    min_tokens: int = 0  # stop_ids are masked until this many tokens are generated
    stop_ids: tuple[int, ...] = ()  # EOS (unless ignored) and stop_token_ids: the row ends on any of these
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # empty means all
    bad_words: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int | None = None  # None: none; 0: the sampled token; k: and the k best; -1: whole vocabulary
    num_prompt_logprobs: int | None = None
    extra_args: dict[str, Any] = field(default_factory=dict)  # for custom logits processors


@dataclass(slots=True)
class NewRow:
    """A request that enters the batch (for the first time, or again after preemption)."""

    row: int  # its place in the persistent batch, 0 <= row < max_num_seqs
    token_ids: Int32  # prompt and, after a preemption, the tokens generated so far
    num_prompt_tokens: int
    num_computed_tokens: int  # leading tokens whose KV is already in the cache (prefix hit)
    sampling: RowSampling


@dataclass(slots=True)
class SchedulerOutput:
    """One step, or one burst of decode steps.

    For scheduled row i, `num_scheduled_tokens[i]` tokens that follow its computed ones are run. Where `samples[i]` is
    1, the last of them is the row's last known token and the step samples its successor. In a burst (`num_steps` > 1)
    every row has one scheduled token and samples; row i takes part in the first `row_steps[i]` of the decode steps.
    """

    step_id: int
    rows: Int32  # [n] places in the persistent batch
    num_scheduled_tokens: Int32  # [n]
    samples: npt.NDArray[np.uint8]  # [n]
    row_steps: Int32  # [n], 1 outside bursts
    num_steps: int = 1
    new_rows: list[NewRow] = field(default_factory=list)
    block_rows: Int32 = field(default_factory=lambda: np.empty(0, np.int32))  # [b] row that gets a block
    block_positions: Int32 = field(default_factory=lambda: np.empty(0, np.int32))  # [b] index in its block table
    block_ids: Int32 = field(default_factory=lambda: np.empty(0, np.int32))  # [b]

    @property
    def rows_decode_apart(self) -> bool:
        """Whether every row decodes, and reads nothing that another row writes in the same step.

        Rows share full blocks only, and write to blocks of their own. A block that becomes full in this plan can
        already be a prefix hit, but only of a row that enters with it.
        """
        decode = bool(self.samples.all() and (self.num_scheduled_tokens == 1).all())
        return decode and not any(new.num_computed_tokens for new in self.new_rows)

    def encode(self) -> bytes:
        """The frame of this plan."""
        header: dict[str, Any] = {"step_id": self.step_id, "num_steps": self.num_steps, "new": []}
        arrays = [getattr(self, name) for name in _PLAN_ARRAYS]
        for new in self.new_rows:
            header["new"].append(
                [new.row, new.num_prompt_tokens, new.num_computed_tokens, _sampling_to_json(new.sampling)]
            )
            arrays.append(new.token_ids)
        return encode_frame(header, arrays)

    @classmethod
    def decode(cls, frame: bytes) -> SchedulerOutput:
        """The plan in a frame; arrays are read-only views of it."""
        header, arrays = decode_frame(frame)
        rows, counts, samples, row_steps = arrays[:4]
        plan = cls(header["step_id"], rows, counts, samples, row_steps, header["num_steps"])
        plan.block_rows, plan.block_positions, plan.block_ids = arrays[4:7]
        for (row, num_prompt, num_computed, sampling), token_ids in zip(header["new"], arrays[7:], strict=True):
            plan.new_rows.append(NewRow(row, token_ids, num_prompt, num_computed, _sampling_from_json(sampling)))
        return plan


_PLAN_ARRAYS = ("rows", "num_scheduled_tokens", "samples", "row_steps", "block_rows", "block_positions", "block_ids")


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities of T tokens: column 0 is the token itself, columns 1..k the k most likely, best first.

    Rows of a batch may ask for different k: unused columns hold id -1.
    """

    ids: Int32  # [T, k + 1]
    logprobs: Float32  # [T, k + 1]
    ranks: Int32  # [T] rank of the token itself, 1 = most likely


def concat_logprobs(parts: list[TokenLogprobs]) -> TokenLogprobs:
    """Entries of consecutive tokens as one."""
    if len(parts) == 1:
        return parts[0]
    return TokenLogprobs(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.logprobs for p in parts]),
        np.concatenate([p.ranks for p in parts]),
    )


@dataclass(slots=True)
class StepOutput:
    """What a step produced, in the order of the plan's sampling rows (those with samples == 1)."""

    step_id: int
    token_ids: Int32  # [num_sampling_rows, num_steps]; -1 where the row took no part or had already ended
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by index among sampling rows; T = steps taken
    prompt_logprobs: dict[int, tuple[int, TokenLogprobs]] = field(default_factory=dict)
    # by index among the plan's rows: (position of the first predicted token, its entries)

    def encode(self) -> bytes:
        """The frame of this output."""
        header = {
            "step_id": self.step_id,
            "logprobs": list(self.logprobs),
            "prompt": [[index, start] for index, (start, _) in self.prompt_logprobs.items()],
        }
        arrays: list[npt.NDArray[Any]] = [self.token_ids]
        for entry in [*self.logprobs.values(), *(e for _, e in self.prompt_logprobs.values())]:
            arrays += [entry.ids, entry.logprobs, entry.ranks]
        return encode_frame(header, arrays)

    @classmethod
    def decode(cls, frame: bytes) -> StepOutput:
        """The output in a frame; arrays are read-only views of it."""
        header, arrays = decode_frame(frame)
        entries = [TokenLogprobs(*arrays[i : i + 3]) for i in range(1, len(arrays), 3)]
        num_sampled = len(header["logprobs"])
        return cls(
            header["step_id"],
            arrays[0],
            dict(zip(header["logprobs"], entries[:num_sampled], strict=True)),
            {
                index: (start, entry)
                for (index, start), entry in zip(header["prompt"], entries[num_sampled:], strict=True)
            },
        )


def encode_frame(header: dict[str, Any], arrays: list[npt.NDArray[Any]]) -> bytes:
    """One bytes object: header length, JSON header with the arrays' dtypes and shapes, the arrays' bytes."""
    header["arrays"] = [[a.dtype.str, a.shape] for a in arrays]
    head = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *(np.ascontiguousarray(a).tobytes() for a in arrays)])


def decode_frame(frame: bytes) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """Header and arrays (read-only views) of a frame."""
    (length,) = _LENGTH.unpack_from(frame)
    offset = _LENGTH.size + length
    header = json.loads(frame[_LENGTH.size : offset])
    arrays = []
    for dtype, shape in header.pop("arrays"):
        array: npt.NDArray[Any] = np.frombuffer(frame, np.dtype(dtype), int(np.prod(shape)), offset).reshape(shape)
        offset += array.nbytes
        arrays.append(array)
    return header, arrays


_DEFAULT_SAMPLING = asdict(RowSampling())


def _sampling_to_json(sampling: RowSampling) -> dict[str, Any]:
    return {name: value for name in _DEFAULT_SAMPLING if (value := getattr(sampling, name)) != _DEFAULT_SAMPLING[name]}


def _sampling_from_json(fields: dict[str, Any]) -> RowSampling:
    for name in ("stop_ids", "allowed_token_ids"):
        if name in fields:
            fields[name] = tuple(fields[name])
    for name in ("logit_bias", "bad_words"):
        if name in fields:
            fields[name] = tuple(tuple(item) for item in fields[name])
    return RowSampling(**fields)
