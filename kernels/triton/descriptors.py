"""Tensor descriptors (TMA): a few threads ask for whole tiles, and addresses cost no registers."""

from __future__ import annotations

import functools

import torch

_BYTES = 16  # what starts and strides must be multiples of


@functools.cache
def used_on(device: torch.device) -> bool:
    """Tiles were chosen on Hopper; other generations have other matrix instructions. Triton's interpreter has them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def describable(x: torch.Tensor) -> bool:
    """Whether a descriptor can have this place and these strides, of 16-bit values."""
    if x.dtype.itemsize != 2 or x.stride(-1) != 1 or x.data_ptr() % _BYTES:
        return False
    return all(stride * x.dtype.itemsize % _BYTES == 0 for stride in x.stride()[:-1])
