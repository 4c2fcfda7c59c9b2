"""Parameters that know how to fill themselves from a checkpoint's tensor, reading only this rank's part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from shoal.workers.loading.base import TensorSource

    WeightLoader = Callable[["WeightParameter", "TensorSource", int | None], None]


class WeightParameter(torch.nn.Parameter):
    """An uninitialized parameter of the caller's default dtype and device.

    `weight_loader(param, source, shard_id)` copies this rank's part of `source` into it; `shard_id` says which of a
    fused layer's parts the source is (its index), None: the whole. `num_shards`: parts a checkpoint may split it into.
    """

    weight_loader: WeightLoader
    num_shards: int

    def __new__(cls, shape: tuple[int, ...], weight_loader: WeightLoader, num_shards: int = 1) -> WeightParameter:
        """A parameter of that shape, without gradient."""
        parameter: WeightParameter = super().__new__(cls, torch.empty(shape), requires_grad=False)
        parameter.weight_loader = weight_loader
        parameter.num_shards = num_shards
        return parameter


def load_replicated(param: WeightParameter, source: TensorSource, shard_id: int | None) -> None:
    """The whole tensor, as it is."""
    assert shard_id is None
    check_shape(source, tuple(param.shape))
    copy_into(param, source.load())


def check_shape(source: TensorSource, expected: tuple[int, ...]) -> None:
    """ValueError naming the tensor and both shapes."""
    if tuple(source.shape) != expected:
        raise ValueError(
            f"shape mismatch for {source.name!r}: the checkpoint has {tuple(source.shape)}, "
            f"the model's config asks for {expected}"
        )


def copy_into(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy with conversion to the target's dtype and device."""
    assert target.shape == tensor.shape, (target.shape, tensor.shape)
    target.data.copy_(tensor)
