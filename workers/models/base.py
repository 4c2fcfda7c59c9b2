"""What every model family offers to the runner, and how its weights are found in a checkpoint."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from shoal.workers.layers.parameter import WeightParameter
from shoal.workers.pipeline import WHOLE, Stage

if TYPE_CHECKING:
    from shoal.workers.batch import ForwardBatch
    from shoal.workers.layers.embedding import ParallelLMHead
    from shoal.workers.loading.base import TensorSource
    from shoal.workers.models.spec import ModelSpec
    from shoal.workers.parallel import TensorParallel

HEAD = "lm_head.weight"


class Elsewhere(torch.nn.Module):
    """Stands where a module would be that another pipeline stage holds."""


class Model(torch.nn.Module, ABC):
    """Base of the families. A subclass builds its layers under the caller's default dtype and device.

    What this rank's stage does not hold is `Elsewhere`: `layer_list` and `held` see to that. The first stage embeds; a
    later one starts from `batch.hidden`. The last has the final norm and the head; an earlier one returns what the next
    starts from.

    Modules have the checkpoint's names without `checkpoint_prefixes`; layers that run as one are listed in
    `packed_modules_mapping` {ours: [theirs, in order]}.
    """

    packed_modules_mapping: ClassVar[Mapping[str, Sequence[str]]] = {}
    checkpoint_prefixes: ClassVar[Sequence[str]] = ()  # longest first
    ignored_weights: ClassVar[Sequence[str]] = ()  # patterns of buffers that old checkpoints carry
    embedding_name: ClassVar[str] = "embed_tokens.weight"

    lm_head: ParallelLMHead

    def __init__(self, spec: ModelSpec, tp: TensorParallel, stage: Stage = WHOLE) -> None:
        super().__init__()
        spec.check_tensor_parallel(tp.world_size)
        self.spec = spec
        self.tp = tp
        self.stage = stage
        self.stage_layers = spec.stage_layers(stage.index, stage.count)
        self.needs_embedding = stage.first or (stage.last and spec.tie_word_embeddings)

    def layer_list(self, build: Callable[[int], torch.nn.Module]) -> torch.nn.ModuleList:
        """All layers by their numbers in the checkpoint; those of other stages are Elsewhere."""
        return torch.nn.ModuleList(
            build(layer) if layer in self.stage_layers else Elsewhere() for layer in range(self.spec.num_layers)
        )

    def held(self, here: bool, build: Callable[[], Any]) -> Any:
        """`build()` if this stage holds the module."""
        return build() if here else Elsewhere()

    def own(self, layers: torch.nn.ModuleList, kv_cache: Sequence[torch.Tensor]) -> Iterator[tuple[Any, torch.Tensor]]:
        """This stage's layers, each with its cache."""
        return zip(islice(layers, self.stage_layers.start, self.stage_layers.stop), kv_cache, strict=True)

    @abstractmethod
    def forward(self, batch: ForwardBatch, kv_cache: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hidden states [num_tokens, hidden] after the final norm, or what the next stage starts from.

        Where the batch names `sampling_rows`, the last stage returns [n, hidden], those of the rows' last tokens.
        `kv_cache[i]`, of this stage's i-th layer, is [2, num_blocks, block_size, num_kv_heads_per_rank, head_dim]; this
        pass's keys and values are written into it.
        """

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> logits [n, vocab_size], the same on every rank."""
        return self.lm_head.gather(self.local_logits(hidden))

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> logits of this rank's part of the vocabulary, [n, lm_head.rows]; padding has logits too."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def load_weights(self, sources: Iterable[TensorSource]) -> None:
        """Fill every parameter from a checkpoint's tensors, in any order; this rank reads its own parts only.

        ValueError: a tensor the model has no place for, one of another shape, or parameters that got none.
        """
        parameters = {name: p for name, p in self.named_parameters() if isinstance(p, WeightParameter)}
        missing = {(name, shard) for name, p in parameters.items() for shard in range(p.num_shards)}
        head: TensorSource | None = None
        for source in sources:
            if any(re.search(pattern, source.name) for pattern in self.ignored_weights):
                continue
            name, shard_id = self._place(self._strip(source.name))
            if name == HEAD and self.spec.tie_word_embeddings:
                head = source  # the embedding's own tensor counts, unless the checkpoint kept only this one
                continue
            if name not in parameters:
                if self._is_elsewhere(name):
                    continue
                raise ValueError(f"There is no module or parameter named {source.name!r} in {type(self).__name__}")
            _fill(parameters[name], source, shard_id)
            missing -= (
                {(name, s) for s in range(parameters[name].num_shards)} if shard_id is None else {(name, shard_id)}
            )
        if head is not None and (self.embedding_name, 0) in missing:
            _fill(parameters[self.embedding_name], head, None)
            missing.discard((self.embedding_name, 0))
        if missing:
            names = sorted({self._checkpoint_name(*place) for place in missing})
            raise ValueError(
                f"Following weights were not initialized from checkpoint: {{{', '.join(map(repr, names))}}}"
            )

    def _is_elsewhere(self, name: str) -> bool:
        """Whether another pipeline stage holds the module of this parameter."""
        module: Any = self
        for part in name.split("."):
            module = getattr(module, part, None)
            if isinstance(module, Elsewhere):
                return True
        return False

    def _strip(self, name: str) -> str:
        for prefix in self.checkpoint_prefixes:
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        return name

    def _place(self, name: str) -> tuple[str, int | None]:
        """Our parameter and the part of it that a checkpoint's name (without prefix) means."""
        path = name.split(".")
        for ours, theirs in self.packed_modules_mapping.items():
            for index, part in enumerate(theirs):
                if len(path) > 1 and path[-2] == part:
                    return ".".join([*path[:-2], ours, path[-1]]), index
        return name, None

    def _checkpoint_name(self, name: str, shard: int) -> str:
        path = name.split(".")
        if len(path) > 1 and path[-2] in self.packed_modules_mapping:
            path[-2] = self.packed_modules_mapping[path[-2]][shard]
        return ".".join(path)


def _fill(param: WeightParameter, source: TensorSource, shard_id: int | None) -> None:
    param.weight_loader(param, source, shard_id)
