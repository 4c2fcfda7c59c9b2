"""Random weights, for tests of everything but the answers."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from shoal.workers.loading.base import Loader

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from shoal.workers.config import LoadConfig
    from shoal.workers.loading.base import TensorSource

MATRIX_RANGE = 0.02  # as initializer_range of most configs: activations stay finite in float16 for any width in use
BIAS_RANGE = 0.001


class DummyLoader(Loader):
    """Fills a model where it stands: no file is looked for."""

    def sources(self, load: LoadConfig) -> Iterator[TensorSource]:
        """Always raises ValueError: dummy weights have no files."""
        raise ValueError("load_format 'dummy' has no files to read; use load_weights(model, load)")

    def load(self, model: nn.Module, load: LoadConfig) -> None:
        """Matrices uniform in ±0.02, norm weights 1, biases within ±0.001.

        Values depend on load.seed, the parameter's name, its shape and its device type, and on nothing else; ranks of a
        tensor-parallel model therefore hold equal shards where a real checkpoint would give each its own.
        """
        import torch

        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.is_floating_point(), f"{name}: no random values for {parameter.dtype}"
                _fill(name, parameter, load.seed)


def _fill(name: str, parameter: torch.Tensor, seed: int) -> None:
    import torch

    # A stream per name: a parameter's values do not move when another one is added before it.
    generator = torch.Generator(device=parameter.device)
    generator.manual_seed(zlib.crc32(f"{seed}:{name}".encode()))  # the CPU generator looks at 32 bits only
    if parameter.dim() > 1:
        parameter.uniform_(-MATRIX_RANGE, MATRIX_RANGE, generator=generator)
    elif name.endswith("bias"):
        parameter.uniform_(-BIAS_RANGE, BIAS_RANGE, generator=generator)
    else:
        parameter.fill_(1.0)
