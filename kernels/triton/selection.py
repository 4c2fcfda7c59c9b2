"""Finding the best k ids of rows of logits without ordering them, for top_ids and sample_filtered.

Scores are logits / temperature, -inf below a floor (min_p). The order is that of the references: by score, the lower id
first among equals. An id is "ahead of" (value, bound) where its score is above value, or equal to it with id < bound.

1. `tile_maxima`: the best score of every tile of 32 ids, reading the logits once.
2. `bounds`: the k-th best of these maxima. At least k ids reach it, and in any order but a contrived one not many more.
3. `collect`: the ids that reach it go to a buffer, in no order; only tiles that have some are read again.
4. In one program a row, `kth` searches the buffer for the place of the k-th id by bisection: first of the float's bits,
   then, among equals, of the id. Counting is exact and takes no order, so neither the tiles nor the buffer decide what
   is found. Where more ids reach the bound than the buffer holds, the same search runs over the row itself.

Everything runs on the device: nothing here is asked by the host, and graphs may record it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE = 32
_CHUNK = 4096
CAPACITY = 4096
_INF = tl.constexpr(float("inf"))
NO_ID = tl.constexpr(2147483647)
_UNITS = tl.constexpr(1099511627776.0)


@triton.jit
def score_of(logits, temperature, floor):
    """The score as the reference rounds it; NaN counts as -inf."""
    scores = tl.div_rn(logits.to(tl.float32), temperature)
    return tl.where(scores >= floor, scores, -_INF)


@triton.jit
def load_scores(base, ids_ptr, offs, mask, temperature, floor, ROW: tl.constexpr):
    """(scores, ids): of a row of logits (ROW), or of buffers of collected scores and ids. -inf where masked."""
    loaded = tl.load(base + offs, mask=mask, other=-_INF)
    if ROW:
        scores = score_of(loaded, temperature, floor)
        ids = offs
    else:
        scores = loaded
        ids = tl.load(ids_ptr + offs, mask=mask, other=NO_ID)
    return scores, ids


@triton.jit
def is_ahead(scores, ids, value, bound):
    """Of the order in which ids are taken; (-inf, number of ids) has all of them ahead."""
    return (scores > value) | ((scores == value) & (ids < bound))


@triton.jit
def value_of(key):
    """The float of an integer that orders as floats do."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(scores, best):
    """exp(scores - best) in units of 2**-40: integers, so that sums do not depend on their order. 0 for -inf."""
    share = tl.where(scores > -_INF, tl.exp(scores - best), 0.0)
    return (share * _UNITS).to(tl.int64)


@triton.jit
def _count(base, ids_ptr, length, temperature, floor, value, bound, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """How many are ahead of (value, bound)."""
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < length
        scores, ids = load_scores(base, ids_ptr, offs, mask, temperature, floor, ROW)
        counts += (mask & is_ahead(scores, ids, value, bound)).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def kth(base, ids_ptr, length, temperature, floor, k, vocab, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """(value, bound) that exactly the best k of `length` ids are ahead of, all of them where there are no more."""
    value = -_INF
    bound = vocab
    if k < length:
        low = tl.full([], -2139095041, tl.int64)  # -inf: all ids reach it
        high = tl.full([], 2139095041, tl.int64)  # beyond inf: none does
        reaching = length
        while high - low > 1:
            middle = (low + high) >> 1
            count = _count(base, ids_ptr, length, temperature, floor, value_of(middle), NO_ID, ROW, BLOCK)
            if count >= k:
                low = middle
                reaching = count
            else:
                high = middle
            if count == k:
                high = middle + 1
        value = value_of(low)
        if reaching > k:  # more equals than places: the lowest ids get them
            fewer = 0
            while bound - fewer > 1:
                middle_id = (fewer + bound) >> 1
                count = _count(base, ids_ptr, length, temperature, floor, value, middle_id, ROW, BLOCK)
                if count >= k:
                    bound = middle_id
                else:
                    fewer = middle_id
    return value, bound


@triton.jit
def tile_maxima_kernel(
    logits_ptr, temperature_ptr, maxima_ptr, vocab, logits_stride, num_tiles, CHUNK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """logits [n, vocab] -> maxima [n, num_tiles]: the best score of each tile."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * logits_stride + offs, mask=offs < vocab, other=-_INF).to(tl.float32)
    logits = tl.where(logits == logits, logits, -_INF)
    best = tl.max(tl.reshape(logits, [CHUNK // TILE, TILE]), 1)
    if temperature_ptr is not None:
        best = tl.div_rn(best, tl.load(temperature_ptr + row))
    tiles = tl.program_id(1) * (CHUNK // TILE) + tl.arange(0, CHUNK // TILE)
    tl.store(maxima_ptr + row * num_tiles + tiles, best, mask=tiles < num_tiles)


@triton.jit
def bounds_kernel(maxima_ptr, log_min_p_ptr, floor_ptr, bound_ptr, count_ptr, vocab, num_tiles, k, BLOCK: tl.constexpr):
    """The floor and the collecting bound of each row, [n] each; -inf where all are collected or none."""
    row = tl.program_id(0).to(tl.int64)
    maxima = maxima_ptr + row * num_tiles
    floor = -_INF
    if log_min_p_ptr is not None:
        tops = tl.full([BLOCK], -_INF, tl.float32)
        for start in range(0, num_tiles, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            tops = tl.maximum(tops, tl.load(maxima + offs, mask=offs < num_tiles, other=-_INF))
        floor = tl.max(tops, 0) + tl.load(log_min_p_ptr + row)
    bound = -_INF
    if k < vocab:
        if k <= num_tiles:
            bound, _ = kth(maxima, maxima, num_tiles, 1.0, -_INF, k, num_tiles, True, BLOCK)
    tl.store(floor_ptr + row, floor)
    tl.store(bound_ptr + row, tl.maximum(bound, floor))
    tl.store(count_ptr + row, 0)


@triton.jit
def collect_kernel(
    logits_ptr, temperature_ptr, maxima_ptr, bound_ptr, count_ptr, scores_ptr, ids_ptr,
    vocab, logits_stride, num_tiles, CHUNK: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Scores and ids [n, CAPACITY] of the ids that reach the row's bound, and how many do (also beyond CAPACITY)."""
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bound_ptr + row)
    if bound > -_INF:
        tiles = tl.program_id(1) * (CHUNK // TILE) + tl.arange(0, CHUNK // TILE)
        maxima = tl.load(maxima_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=-_INF)
        if tl.max(maxima, 0) >= bound:
            offs = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
            mask = (maxima >= bound)[:, None] & (offs < vocab)
            logits = tl.load(logits_ptr + row * logits_stride + offs, mask=mask, other=-_INF)
            temperature = 1.0
            if temperature_ptr is not None:
                temperature = tl.load(temperature_ptr + row)
            scores = score_of(logits, temperature, -_INF)
            hits = mask & (scores >= bound)
            slots = tl.atomic_add(count_ptr + row + offs * 0, 1, mask=hits, sem="relaxed")
            kept = hits & (slots < CAPACITY)
            at = row * CAPACITY + slots
            tl.store(scores_ptr + at, scores, mask=kept)
            tl.store(ids_ptr + at, offs, mask=kept)


@dataclass(slots=True)
class Selection:
    """What the first three steps found, of n rows."""

    floor: torch.Tensor  # float32 [n], -inf: none
    bound: torch.Tensor  # float32 [n]; -inf: nothing was collected
    count: torch.Tensor  # int32 [n], ids that reach the bound
    scores: torch.Tensor  # float32 [n, CAPACITY]
    ids: torch.Tensor  # int32 [n, CAPACITY]


def select(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    log_min_p: torch.Tensor | None,
    k: int,
) -> Selection:
    """Steps 1 to 3 for the best k ids. logits [n, vocab], n above 0; temperature None: 1."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    tiles, chunks = triton.cdiv(vocab, TILE), triton.cdiv(vocab, _CHUNK)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    maxima = empty(torch.float32, rows, tiles)
    found = Selection(
        floor=empty(torch.float32, rows),
        bound=empty(torch.float32, rows),
        count=empty(torch.int32, rows),
        scores=empty(torch.float32, rows, CAPACITY),
        ids=empty(torch.int32, rows, CAPACITY),
    )
    stride = logits.stride(0)
    tile_maxima_kernel[(rows, chunks)](
        logits, temperature, maxima, vocab, stride, tiles, CHUNK=_CHUNK, TILE=TILE, num_warps=8
    )
    bounds_kernel[(rows,)](
        maxima,
        log_min_p,
        found.floor,
        found.bound,
        found.count,
        vocab,
        tiles,
        k,
        BLOCK=min(8192, max(32, triton.next_power_of_2(tiles))),
        num_warps=8,
    )
    collect_kernel[(rows, chunks)](
        logits,
        temperature,
        maxima,
        found.bound,
        found.count,
        found.scores,
        found.ids,
        vocab,
        stride,
        tiles,
        CHUNK=_CHUNK,
        TILE=TILE,
        CAPACITY=CAPACITY,
        num_warps=8,
    )
    return found
