"""Counter-based random numbers: Philox4x32-10, and the Gumbel noise that sampling makes of it.

The noise of vocabulary id v, at output position t of a row with the 64-bit stream s, is a function of (s, t, v) alone:

    key = (s & 0xFFFFFFFF, s >> 32); counter = (v // 4, t, 0, 0); w = word v % 4 of Philox4x32-10(counter, key)
    u = min((w + 0.5) * 2**-32, 1 - 2**-24)      in float32, from the rounded w
    noise = -log(-log1p(-u))                     in float32

-log1p(-u) is an exponential variate whose small values, the ones that win, keep float32's full relative precision down
to 2**-33. (-log(u) would have them at u near 1, where float32 is coarse; u would round to 1, and the noise to +inf,
once in 2**24 draws, that is at some id of every few hundred tokens.) The bound on u keeps the noise finite.

Words are kept in int64: the product of two 32-bit values wraps there modulo 2**64, so both its halves are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LARGEST_U = 1 - 2**-24


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words for each counter and key.

    All tensors are int64, hold 32-bit values and broadcast together; so do the four words that come back.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        # c1 and c3 keep the whole product: its high half meets a mask before it matters.
        c0, c1, c2, c3 = _mix(p1, c1, k0), p1, _mix(p0, c3, k1), p0
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _mix(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    return ((product >> 32) ^ (word ^ key)).bitwise_and_(_MASK)


def gumbel_noise(streams: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Noise of every vocabulary id: float32 [n, vocab_size].

    streams: int64 [n], bit patterns of unsigned 64-bit numbers. positions: int64 [n], below 2**32.
    """
    quads = torch.arange((vocab_size + 3) // 4, device=streams.device).unsqueeze(0)
    words = _words(quads, streams, positions)
    uniform = torch.empty(streams.shape[0], quads.shape[1], 4, dtype=torch.float32, device=streams.device)
    for i, word in enumerate(words):
        uniform[:, :, i] = word  # written as float32 in place of a second int64 tensor of four times the size
    return _gumbel_of_words(uniform).flatten(1)[:, :vocab_size]


def gumbel_noise_at(streams: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Noise of the given vocabulary ids, the same numbers as gumbel_noise's.

    streams, positions: as for gumbel_noise. ids: int64 [n, k]. Returns float32 [n, k].
    """
    words = torch.stack(_words(ids >> 2, streams, positions), dim=-1)
    chosen = words.gather(-1, (ids & 3).unsqueeze(-1)).squeeze(-1)
    return _gumbel_of_words(chosen.to(torch.float32))


def _words(quads: Tensor, streams: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    key = ((streams & _MASK).unsqueeze(1), ((streams >> 32) & _MASK).unsqueeze(1))
    zero = torch.zeros(1, 1, dtype=torch.int64, device=streams.device)
    return philox4x32((quads, positions.unsqueeze(1), zero, zero), key)


def _gumbel_of_words(words: Tensor) -> Tensor:
    minus_u = words.mul_(-(2.0**-32)).sub_(2.0**-33).clamp_(min=-_LARGEST_U)
    return minus_u.log1p_().neg_().log_().neg_()
