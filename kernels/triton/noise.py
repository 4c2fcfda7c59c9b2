"""The noise of kernels/ops/philox.py in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(quads, stream, position):
    """The four words of counter (quads, position, 0, 0): those of ids 4 * quads and the three after it."""
    zero = (quads * 0).to(tl.uint32)
    return tl.philox(stream, quads.to(tl.uint32), zero + position.to(tl.uint32), zero, zero)


@triton.jit
def words_of_block(first, stream, position, SIZE: tl.constexpr):
    """The words of ids first to first + SIZE - 1; `first` is a multiple of 4."""
    w0, w1, w2, w3 = philox(first // 4 + tl.arange(0, SIZE // 4), stream, position)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [SIZE])


@triton.jit
def words_of_ids(ids, stream, position):
    """The word of each id, whatever the ids: four times the work of words_of_block."""
    w0, w1, w2, w3 = philox(ids >> 2, stream, position)
    return tl.where((ids & 2) != 0, tl.where((ids & 1) != 0, w3, w2), tl.where((ids & 1) != 0, w1, w0))


@triton.jit
def gumbel(words):
    """-log(-log1p(-u)), u the uniform variate of a word."""
    u = tl.minimum(words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994)
    y = 1.0 - u
    # -log1p(-u), also where 1 - u rounds to 1
    exponential = tl.where(y == 1.0, u, tl.log(y) * (u / tl.where(y == 1.0, 1.0, y - 1.0)))
    return -tl.log(exponential)
