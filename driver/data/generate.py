"""Generate: the class that Ray Data's map_batches runs. One actor, one engine; many blocks at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import Any

from shoal.driver.binding import Row
from shoal.driver.data.config import make_processor_config
from shoal.driver.data.pump import Answer, Pump
from shoal.driver.data.rows import STATE, answer_arrays, as_table, with_columns
from shoal.driver.data.stages import Preparation
from shoal.driver.jobs.faults import Fault
from shoal.driver.jobs.forms.plain import answer_columns
from shoal.driver.jobs.model import RowModel
from shoal.driver.jobs.packed import unpack_ids
from shoal.driver.jobs.prepare import BoundSet
from shoal.driver.outputs import make_output

_SILENT_S = 20.0  # after which an engine takes it that this actor is no more


class Generate:
    """Answers batches of rows: `ds.map_batches(shoal.data.Generate, fn_constructor_kwargs={"engine": {...}}, ...)`.

    Rows go to the engine one by one, and a batch leaves when its last row is finished. So that slow rows do not leave
    the engine idle, let the actor have many batches at once: `build_processor` does, and docs/ray_data.md says how
    map_batches is told. What comes in and what goes out is said there too.
    """

    def __init__(self, *, made: list[Any] | None = None, env: dict[str, str] | None = None, **fields: Any) -> None:
        """`fields`: those of ProcessorConfig. `made`, `env`: from build_processor.

        Starts the engine: ValueError for what the model cannot do, PlacementError where the cluster has no room.
        """
        import ray

        os.environ.update(env or {})
        if made is None:
            self._config = make_processor_config(fields)
            self._model = RowModel.find(self._config.engine)
        else:
            self._config, self._model = ray.get(made[0])
        self._preparation: Preparation | None = None
        solo_deaths = self._config.solo_deaths
        start = self._model.starter(solo_deaths, _SILENT_S)
        self._pump = Pump(start, solo_deaths, self._config.max_restarts, self._config.idle_s)
        self._tools = self._model.tools(self._pump.resolved.max_model_len)
        self._bounds = BoundSet(self._tools)
        self._pump.open(self._tools.binder)

    def __del__(self) -> None:
        if hasattr(self, "_pump"):
            with contextlib.suppress(Exception):  # the interpreter may be on its way out
                self._pump.close()

    async def __call__(self, table: Any) -> Any:
        """The rows of a batch, in any of Ray Data's formats, with their answers, as an Arrow table."""
        table = as_table(table)
        if STATE not in table.column_names:
            if self._preparation is None:
                self._preparation = Preparation(self._config, self._model)
            table = self._preparation.run(table)
        states = table.column(STATE).to_pylist()
        places: list[int] = []
        rows: list[Row] = []
        faults: list[Fault | None] = [None] * len(states)
        for place, state in enumerate(states):
            row = self._row(place, state)
            if isinstance(row, Fault):
                faults[place] = row
            else:
                places.append(place)
                rows.append(row)
        answers: list[dict[str, Any]] = [{} for _ in states]
        found = await asyncio.wrap_future(self._pump.run(rows))
        for place, row, answer in zip(places, rows, found, strict=True):
            columns = self._columns(row, answer)
            if isinstance(columns, Fault):
                faults[place] = columns
            else:
                answers[place] = columns
        return self._joined(table, states, answers, faults)

    def _row(self, place: int, state: dict[str, Any]) -> Row | Fault:
        if state["fault"] is not None:
            return Fault(**json.loads(state["fault"]))
        ids = unpack_ids(state["token_ids"])
        row = Row(place, state["stream"], 0, state["prompt"], ids, self._bounds.find(state["sampling"]))
        try:
            self._tools.inputs.check_length(ids)  # the engine may take less than the model would
        except ValueError as error:
            return Fault("invalid_prompt", "tokenize", str(error))
        try:
            self._tools.binder.check_length(row)
        except ValueError as error:
            return Fault("invalid_parameter", "parameters", str(error))
        return row

    def _columns(self, row: Row, answer: Answer) -> dict[str, Any] | Fault:
        if isinstance(answer, Fault):
            return answer
        output = make_output(
            str(row.index), row.prompt, row.token_ids, row.bound.params, answer, self._tools.decoder, log_stats=False
        )
        if output.error is not None:
            code = next((child.error_code for child in answer if child.error_code), "engine_refused")
            return Fault(code, "engine", output.error)
        return answer_columns(output, token_ids=True, always_completions=False)

    def _joined(self, table: Any, states: list[Any], answers: list[dict[str, Any]], faults: list[Fault | None]) -> Any:
        import pyarrow as pa

        columns = answer_arrays(answers, faults, self._config.error_column)
        if self._config.prompt_column not in table.column_names:  # of conversations: what the template made of them
            columns[self._config.prompt_column] = pa.array([state["prompt"] for state in states], pa.string())
        return with_columns(table.drop_columns([STATE]), columns)
