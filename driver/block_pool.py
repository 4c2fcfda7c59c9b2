"""KV blocks: who holds which, which hold reusable prefixes, and which goes next. Integers only; no tensors.

A block is free (on the free list, in order of reuse) or used (reference count above 0). A free block may still hold a
cached prefix: it is found by its hash until it is handed out again, so the free list is also the cache's LRU order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from shoal.driver.request import Request

_ROOT = b"shoal-prefix"


class BlockPool:
    """Blocks 0..num_blocks-1 with reference counts, an LRU free list and a map from prefix hash to block."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks some request holds."""
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out `count` blocks (there must be as many free); prefixes they cached are forgotten, oldest first."""
        assert count <= len(self._free)
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            known = self._hashes[block]
            if known is not None:
                del self._cached[known]
                self._hashes[block] = None
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def find(self, prefix_hash: bytes) -> int | None:
        """The block that holds this prefix, if any; its place in the free list does not change."""
        return self._cached.get(prefix_hash)

    def is_free(self, block: int) -> bool:
        """Whether nobody holds it."""
        return self._ref_counts[block] == 0

    def hold(self, block: int) -> None:
        """One more holder; a free block leaves the free list with its contents kept."""
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each. Those without a prefix are reused first, the others last, in the given order."""
        for block in blocks:
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} released more often than held"
            self._ref_counts[block] = count
            if count == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, prefix_hash: bytes) -> None:
        """From now on `find(prefix_hash)` gives this block, unless another already holds the same prefix."""
        if prefix_hash not in self._cached and self._hashes[block] is None:
            self._cached[prefix_hash] = block
            self._hashes[block] = prefix_hash

    def forget_all(self) -> None:
        """Drop every cached prefix; holders keep their blocks."""
        self._cached.clear()
        self._hashes = [None] * self.num_blocks

    def check(self) -> None:
        """Assert the pool's invariants (tests)."""
        free = set(self._free)
        assert free == {b for b, count in enumerate(self._ref_counts) if count == 0}
        assert all(self._hashes[block] == key for key, block in self._cached.items())
        assert sum(known is not None for known in self._hashes) == len(self._cached)


class KVCacheManager:
    """Blocks of requests: allocation, prefix hits, release."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the request's leading tokens; at least one token is always left to compute."""
        if not self.enable_prefix_caching or request.source.params.skip_reading_prefix_cache:
            return []
        hits: list[int] = []
        for prefix_hash in self._hash(request, (request.num_tokens - 1) // self.block_size):
            block = self.pool.find(prefix_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def can_admit(self, request: Request, hits: Sequence[int]) -> bool:
        """Whether all its known tokens fit beside what is used now."""
        revived = sum(map(self.pool.is_free, hits))
        return self.blocks_for(request.num_tokens) - len(hits) + revived <= self.pool.num_free

    def admit(self, request: Request, hits: list[int]) -> None:
        """Give a request without blocks its prefix hits."""
        assert not request.block_table
        for block in hits:
            self.pool.hold(block)
        request.block_table = list(hits)
        request.num_hashed_blocks = len(hits)
        self.num_queried_tokens += request.num_tokens
        self.num_hit_tokens += len(hits) * self.block_size

    def missing(self, request: Request, num_tokens: int) -> int:
        """Blocks it lacks to hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(request.block_table))

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Let the request hold `num_tokens` tokens; False, with nothing changed, if there are too few blocks."""
        count = self.missing(request, num_tokens)
        if count > self.pool.num_free:
            return False
        if count:
            request.block_table += self.pool.take(count)
        return True

    def remember(self, request: Request) -> None:
        """Make its full blocks findable: those whose tokens are all known and computed (or planned, which is as good:
        plans run in order)."""
        if not self.enable_prefix_caching:
            return
        count = min(request.num_computed_tokens, request.num_tokens) // self.block_size
        if count <= request.num_hashed_blocks:
            return
        hashes = self._hash(request, count)
        for index in range(request.num_hashed_blocks, count):
            self.pool.remember(request.block_table[index], hashes[index])
        request.num_hashed_blocks = count

    def release(self, request: Request) -> None:
        """Take all its blocks; the tail is reused before the head, which others may share."""
        self.pool.release(request.block_table[::-1])
        request.block_table = []
        request.num_hashed_blocks = 0

    def emptied(self, num_blocks: int) -> KVCacheManager:
        """A new cache of so many blocks, with nothing in it; counts go on."""
        new = KVCacheManager(num_blocks, self.block_size, self.enable_prefix_caching)
        new.num_queried_tokens, new.num_hit_tokens = self.num_queried_tokens, self.num_hit_tokens
        return new

    def reset(self) -> bool:
        """Forget all prefixes; False, with nothing changed, while any block is held."""
        if self.pool.num_used:
            return False
        self.pool.forget_all()
        return True

    def _hash(self, request: Request, count: int) -> list[bytes]:
        """Hashes of the request's first `count` blocks, each covering everything before it. All ids must be known."""
        known = request.block_hashes
        size = self.block_size
        for index in range(len(known), count):
            parent = known[-1] if index else _ROOT + (request.source.cache_salt or "").encode()
            ids = array("i", request.token_ids[index * size : (index + 1) * size]).tobytes()
            known.append(hashlib.sha256(parent + ids).digest())
        return known[:count]
