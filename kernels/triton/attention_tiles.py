"""Where the tokens of a tile lie in the paged cache. A tile begins at a multiple of TILE positions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_blocks(table, tile, last, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block ids of positions [tile, tile + TILE): one for all where a block holds tiles, else one a position."""
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + tile // BLOCK_SIZE, mask=tile < last, other=0)
    elif TILE % BLOCK_SIZE == 0:
        offs = tl.arange(0, TILE)
        block = tl.load(table + tile // BLOCK_SIZE + offs // BLOCK_SIZE, mask=offs < last - tile, other=0)
    else:
        pos = tile + tl.arange(0, TILE)
        block = tl.load(table + pos // BLOCK_SIZE, mask=pos < last, other=0)
    return block


@triton.jit
def token_offsets(block, tile, block_stride, token_stride, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Offsets in the cache of those positions' tokens. What can be is the same for every tile."""
    offs = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        first = block.to(tl.int64) * block_stride + (tile % BLOCK_SIZE) * token_stride
        at = first + offs * token_stride
    elif TILE % BLOCK_SIZE == 0:
        at = block.to(tl.int64) * block_stride + (offs % BLOCK_SIZE) * token_stride
    else:
        at = block.to(tl.int64) * block_stride + ((tile + offs) % BLOCK_SIZE) * token_stride
    return at
