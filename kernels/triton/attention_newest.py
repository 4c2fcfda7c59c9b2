"""The newest position of a row that decodes, out of its merged projection: queries and key, normalized and rotated."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotation(cos_sin_ptr, position, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Of one position, float32 [HEAD_PAD]: cosines, and sines with the sign that each dimension takes them with."""
    dims = tl.arange(0, HEAD_PAD)
    low = dims < HEAD // 2
    at = cos_sin_ptr + position.to(tl.int64) * HEAD + tl.where(low, dims, dims - HEAD // 2)
    cos = tl.load(at, mask=dims < HEAD, other=0.0)
    sin = tl.load(at + HEAD // 2, mask=dims < HEAD, other=0.0)
    return cos, tl.where(low, -sin, sin)


@triton.jit
def _partners(HEAD: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Each dimension, and the one that it is rotated with."""
    dims = tl.arange(0, HEAD_PAD)
    return dims, tl.where(dims < HEAD // 2, dims + HEAD // 2, dims - HEAD // 2)


@triton.jit
def load_weight(weight_ptr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr):
    """A norm's weights [HEAD_PAD] of each dimension and of its partner; ones that nobody uses where there are none."""
    dims, partners = _partners(HEAD, HEAD_PAD)
    if weight_ptr is not None:
        own = tl.load(weight_ptr + dims, mask=dims < HEAD, other=0.0)
        partner = tl.load(weight_ptr + partners, mask=dims < HEAD, other=0.0)
    else:
        own = tl.full([HEAD_PAD], 1.0, tl.float32)
        partner = own
    return own, partner


@triton.jit
def load_heads(base, count, HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr):
    """`count` heads that lie one after another, zeros beyond: each dimension and its partner [HEADS, HEAD_PAD]."""
    heads = tl.arange(0, HEADS)
    dims, partners = _partners(HEAD, HEAD_PAD)
    mask = (heads < count)[:, None] & (dims < HEAD)[None, :]
    own = tl.load(base + heads[:, None] * HEAD + dims[None, :], mask=mask, other=0.0)
    partner = tl.load(base + heads[:, None] * HEAD + partners[None, :], mask=mask, other=0.0)
    return own, partner


@triton.jit
def norm_rope(own, partner, weight, partner_weight, cos, sin, eps, HEAD: tl.constexpr, NORM: tl.constexpr):
    """Heads [HEADS, HEAD_PAD], normalized and rotated, rounded where qk_norm_rope_store rounds."""
    dtype = own.dtype
    own, partner = own.to(tl.float32), partner.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1) / HEAD + eps)[:, None]
        own = ((own * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
        partner = (partner * scale).to(dtype).to(tl.float32) * partner_weight.to(tl.float32)[None, :]
        partner = partner.to(dtype).to(tl.float32)
    return (own * cos[None, :] + partner * sin[None, :]).to(dtype)
