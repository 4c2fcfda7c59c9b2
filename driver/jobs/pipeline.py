"""A job's input as a Ray Data pipeline: files → lines → rows made ready, in order, a bounded number ahead.

Reading is one task a file. Parsing, keys, templates and tokenizing are tasks of their own, on any CPU of the cluster.
What comes out goes to the job, which alone numbers rows, knows which are done and writes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.files import InputFile
from shoal.driver.jobs.forms.base import make_form
from shoal.driver.jobs.keys import KeyTable, RowKeys
from shoal.driver.jobs.model import RowModel
from shoal.driver.jobs.packed import lines_of, pack_lines, pack_rows
from shoal.driver.jobs.prefix import Position
from shoal.driver.jobs.prepare import Ready, RowPreparer, one_thread
from shoal.driver.jobs.scan import RowReader
from shoal.driver.jobs.sources.registry import BEGINNING, Start, read_rows
from shoal.driver.placement import RANK_CPUS, wait_for_cpus

READ_CPUS, PREPARE_CPUS = 0.25, 0.5
_BLOCK_BYTES = 1 << 20  # small blocks: the first rows come soon, and little is under way; each costs milliseconds
_STORE_BYTES = 64 << 20  # of the object store, for all blocks of the pipeline
_READ_ROWS = 512
_HEAD_ROWS = 1024
_WARM_S = 15.0
_kept: dict[str, Any] = {}  # in a task's process: what the last job's tasks were made with


@dataclass(frozen=True)
class Recipe:
    """What a task needs to make rows ready."""

    config: JobConfig
    form: str
    files: Sequence[InputFile]
    salt: bytes
    model: RowModel
    done: KeyTable  # keys of rows that need nothing
    start: Position  # where reading begins


def warm_up() -> list[Any]:
    """Has processes for both kinds of tasks begin with their imports, while the ledger is read; what to wait for."""
    import ray

    return [ray.remote(num_cpus=cpus, max_retries=0)(_import_all).remote() for cpus in (READ_CPUS, PREPARE_CPUS)]


def _import_all() -> None:
    import ray.data  # noqa: F401
    import transformers.tokenization_utils_tokenizers  # noqa: F401


def import_library() -> None:
    """Seconds, which may go by while Ray starts."""
    import ray.data  # noqa: F401


def wait_for_room(config: JobConfig, stopped: Callable[[], bool]) -> None:
    """Waits until the cluster has the CPUs free that one task of each kind and an engine take at once, or `stopped`.

    PlacementError where it does not come to that: else the job would hold an engine, and no row would ever reach it.
    """
    engine = config.engine
    ranks = engine.tensor_parallel_size * engine.pipeline_parallel_size
    parts = [
        ("to read", [READ_CPUS]),
        ("to tokenize", [PREPARE_CPUS]),
        (f"for an engine of {ranks} rank(s)", [RANK_CPUS] * ranks),
    ]
    wait_for_cpus("the job", parts, engine.placement_timeout_s, engine.wait_for_nodes, stopped)


def prepared_tables(recipe: Recipe, warm: Sequence[Any] = ()) -> Generator[Any, None, None]:
    """ROWS tables, in the order of the input. Ends its tasks when it is closed. Ray must be initialised.

    `warm`: as `warm_up` returned it. Where reading begins inside the input, the first table is made here: engines of a
    job that goes on have work before the processes of its tasks are up.
    """
    at_once = max(1, int(_num_cpus() / 2))
    for file in recipe.files:
        if "memory" in (file.filesystem.protocol, *file.filesystem.protocol):
            raise ValueError(f"input {file.name!r} is in the memory of this process, where tasks cannot read it")
    head = _head(recipe)
    start = recipe.start if head is None else head[1]
    with contextlib.closing(_tables_of_tasks(replace(recipe, start=start), warm, at_once)) as tables:
        with ThreadPoolExecutor(1) as starter:
            first = starter.submit(next, tables, None)
            if head is not None:
                yield _Stage(recipe).run(head[0])
            if first.result() is not None:
                yield first.result()
        yield from tables


def _head(recipe: Recipe) -> tuple[Any, Position] | None:
    """The first LINES table and where it ends; None where that is not to be had at once."""
    start, sources, size = recipe.start, [], 0
    if not start.index or (start.line and not start.offset):  # at the beginning; or a format that knows no places
        return None
    for source in read_rows(recipe.files[start.file], recipe.config.max_line_bytes, Start(start.line, start.offset)):
        sources.append(source)
        size += len(source.raw)
        if len(sources) >= _HEAD_ROWS or size >= _BLOCK_BYTES:
            break
    if not sources:
        return None
    end = Position(start.index + len(sources), start.file, sources[-1].line, sources[-1].end)
    return pack_lines(start.file, sources), end


def _tables_of_tasks(recipe: Recipe, warm: Sequence[Any], at_once: int) -> Generator[Any, None, None]:
    import ray

    if warm:  # else tasks would find these processes busy, and others would start and import the same beside them
        ray.wait(list(warm), num_returns=len(warm), timeout=_WARM_S, fetch_local=False)
    name = uuid.uuid4().hex
    reference = ray.put(recipe)  # unpacked once in each process, not once for each task
    dataset = _dataset(recipe, name, [reference], at_once)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _dataset(recipe: Recipe, name: str, reference: list[Any], at_once: int) -> Any:
    """`at_once`: tasks that prepare. Each has a process that begins with seconds of imports, and the job, which has a
    core of its own, takes what two or three of them make: more would only take turns."""
    import ray
    from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

    for logger in ("ray.data", "ray.data._internal.progress"):  # they tell of every Dataset; a job has its own display
        logging.getLogger(logger).setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_STORE_BYTES)
    limit = recipe.config.max_line_bytes
    with DataContext.current(context):
        count = len(recipe.files) - recipe.start.file
        lines = ray.data.range(count, override_num_blocks=count).map_batches(
            _read,
            batch_size=1,
            num_cpus=READ_CPUS,
            compute=TaskPoolStrategy(),
            fn_kwargs={"files": recipe.files, "limit": limit, "start": recipe.start},
        )
        return lines.map_batches(
            _prepare,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=PREPARE_CPUS,
            compute=TaskPoolStrategy(size=at_once),
            fn_kwargs={"name": name, "reference": reference},
        )


def _read(batch: dict[str, Any], files: Sequence[InputFile], limit: int, start: Position) -> Iterator[Any]:
    (place,) = batch["id"].tolist()
    number = start.file + place
    sources = []
    for source in read_rows(files[number], limit, BEGINNING if place else Start(start.line, start.offset)):
        sources.append(source)
        if len(sources) == _READ_ROWS:
            yield pack_lines(number, sources)
            sources.clear()
    yield pack_lines(number, sources)


def _prepare(table: Any, name: str, reference: list[Any]) -> Any:
    if name not in _kept:
        import ray

        one_thread()
        _kept.clear()
        _kept[name] = _Stage(ray.get(reference[0]))
        gc.freeze()  # imports and tokenizer stay: no search for cycles need look through them again
    stage: _Stage = _kept[name]
    return stage.run(table)


class _Stage:
    """What a task's process keeps from task to task."""

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.config
        self._files, self._done = recipe.files, recipe.done
        self._form = make_form(recipe.form, config)
        self._reader = RowReader(self._form, RowKeys(recipe.salt))
        self._preparer = RowPreparer(
            recipe.model.tools(),
            config.sampling_params,
            config.chat_template_kwargs,
            config.engine.model if config.strict_model else None,
        )

    def run(self, table: Any) -> Any:
        """LINES to ROWS."""
        read = [self._reader.read(0, self._files[file].name, source) for file, source in lines_of(table)]
        rows = [row for row, _ in read]
        done = self._done.find([row.key for row in rows])
        ready: list[Ready | None] = [None] * len(rows)
        places, requests = [], []
        for place, (row, columns) in enumerate(read):
            if row.fault is not None or done[place] >= 0:
                continue
            try:
                requests.append(self._form.request(columns))
                places.append(place)
            except RowError as error:
                row.fault = error.fault
        for place, found in zip(places, self._preparer.prepare(requests), strict=True):
            if isinstance(found, Fault):
                rows[place].fault = found
            else:
                ready[place] = found
        return pack_rows(table, rows, ready)


def _num_cpus() -> float:
    """The CPUs that there are."""
    import ray

    return float(ray.cluster_resources().get("CPU", 0.0))
