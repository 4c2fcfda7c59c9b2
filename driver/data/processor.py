"""build_processor: a Dataset of rows to a Dataset of answered rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shoal.driver.data.config import ProcessorConfig, make_processor_config
from shoal.driver.data.generate import Generate
from shoal.driver.data.stages import RowFunction, new_name, postprocess, prepare
from shoal.driver.engine import connect, environment
from shoal.driver.jobs.model import RowModel
from shoal.driver.local_files import read_template
from shoal.driver.placement import RANK_CPUS, wait_for_cpus

if TYPE_CHECKING:
    from ray.data import Dataset

_PREPARE_ROWS = 256  # made ready at once, at least; Ray Data starts a few tasks a second
_ENGINE_CPUS = 0.01
_POST_CPUS = 0.25
_TASK_CPUS = 1.0  # what Ray Data's own tasks take, and those that read
_SMALL_SLOTS, _BIG_SLOTS = 256, 1024  # rows an engine runs at once where nothing else is said


def build_processor(
    config: ProcessorConfig | Mapping[str, Any],
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
) -> Callable[[Dataset], Dataset]:
    """A function from a Dataset to one with an answer, or an error, in every row.

    `preprocess(row)` returns columns that are laid over the row's (prompt or messages, sampling_params);
    `postprocess(row)` returns the columns of the output, for answered rows. An exception in either is that row's error.
    Uses the Ray that is there, as LLM does, or starts one. Raises ValueError for a wrong config, or a model that cannot
    be used. docs/ray_data.md has the row contract.
    """
    checked = make_processor_config(config)
    model = RowModel.find(checked.engine)
    model.check(checked.sampling_params)
    connect(checked.engine.address)  # before a Dataset is made, which would start or join a Ray by its own rule
    return _Processor(checked, model, preprocess, postprocess)


class _Processor:
    """What build_processor gives."""

    def __init__(
        self, config: ProcessorConfig, model: RowModel, before: RowFunction | None, after: RowFunction | None
    ) -> None:
        self._config, self._model, self._before, self._after = config, model, before, after

    def __call__(self, dataset: Dataset) -> Dataset:
        """Adds the stages; nothing runs before the Dataset is consumed."""
        import ray
        from ray.data import ActorPoolStrategy, TaskPoolStrategy

        config = self._config
        self._wait_for_cpus()
        name, text = new_name(), config.prompt_template
        if text is not None:
            text = read_template("prompt_template", text, config.engine.allowed_local_path)
        light = self._model.portable()
        plain = config.model_copy(update={"prompt_template": text, "engine": light.config})
        preparing = ray.put((plain, light, self._before))
        engine = config.engine.model_copy(update={"hf_token": None})  # the ranks have it from LoadConfig
        whole = replace(self._model, config=engine, resolved=replace(self._model.resolved, hf_config=None))
        generating = ray.put((config.model_copy(update={"engine": engine}), whole))
        slots = config.engine.max_num_seqs or self._slots()
        blocks, size = config.open_blocks(slots), config.block_rows(slots)
        # Ray Data makes one stage of these two while their tasks take the same CPUs, and repartition's take one. In its
        # own tasks cutting blocks takes longer than the rows on few cores, and a new process while the engine waits for
        # its first rows. Whole batches, whatever the blocks; out of a task come the engine's blocks.
        ready = dataset.map_batches(
            prepare,
            batch_size=max(1, max(_PREPARE_ROWS, slots) // size) * size,
            batch_format="pyarrow",
            num_cpus=_TASK_CPUS,
            compute=TaskPoolStrategy(),
            fn_kwargs={"name": name, "reference": [preparing]},
        ).repartition(target_num_rows_per_block=size, strict=True)
        answered = ready.map_batches(
            Generate,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_ENGINE_CPUS,
            compute=ActorPoolStrategy(
                size=config.replicas, max_tasks_in_flight_per_actor=blocks, max_concurrent_calls_per_actor=blocks
            ),
            fn_constructor_kwargs={"made": [generating], "env": environment()},
        )
        if self._after is None:
            return answered
        return answered.map_batches(
            postprocess,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_POST_CPUS,
            compute=TaskPoolStrategy(),
            fn_kwargs={"function": self._after, "error_column": config.error_column},
        )

    def _slots(self) -> int:
        import ray

        return (
            _BIG_SLOTS if ray.cluster_resources().get("GPU") and self._config.engine.device != "cpu" else _SMALL_SLOTS
        )

    def _wait_for_cpus(self) -> None:
        config, engine = self._config, self._config.engine
        each = _ENGINE_CPUS + RANK_CPUS * engine.tensor_parallel_size * engine.pipeline_parallel_size
        wait_for_cpus(
            "the pipeline",
            [
                ("to read and to tokenize", [_TASK_CPUS]),
                (f"for {config.replicas} engine(s) (replicas)", [each] * config.replicas),
            ],
            engine.placement_timeout_s,
            engine.wait_for_nodes,
        )
