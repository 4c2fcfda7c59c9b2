"""The stages of a job's pipeline by hand: lines, rows made ready, and what the job makes of them."""

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from shoal.driver.jobs import pipeline
from shoal.driver.jobs.intake import Intake
from shoal.driver.jobs.keys import KeyTable, RowKeys, id_hash
from shoal.driver.jobs.model import RowModel
from shoal.driver.jobs.packed import lines_of
from shoal.driver.jobs.pipeline import Recipe, prepared_tables
from shoal.driver.jobs.prefix import Position, Prefix
from shoal.driver.jobs.scan import Duplicates
from shoal.driver.jobs.work import Tries

LINES = [
    {"id": "a", "prompt": "one"},
    "{no json",
    {"id": "b", "prompt": "two", "sampling_params": {"temperature": -1}},
    {"id": "a", "prompt": "three"},
    {"id": "\ud800", "messages": [{"role": "user", "content": "four"}]},
    {"id": "c"},
    {"prompt": [5, 6, 7], "sampling_params": {"n": 2}},
    {"id": "d", "prompt": "x" * 200},
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return RowModel.find(_engine(tiny_checkpoint("llama")))


def _engine(folder):
    from shoal.driver.config import make_config

    return make_config(model=folder, max_model_len=128)


@pytest.fixture(autouse=True)
def no_tasks(monkeypatch):
    """Both stages run in this process."""

    def tables(recipe, warm, at_once):
        stage = pipeline._Stage(recipe)
        for number in range(len(recipe.files) - recipe.start.file):
            yield from map(stage.run, pipeline._read({"id": np.array([number])}, recipe.files, 1000, recipe.start))

    monkeypatch.setattr(pipeline, "_tables_of_tasks", tables)
    monkeypatch.setattr(pipeline, "_num_cpus", lambda: 2.0)


class Stages:
    """The stages and the intake of one job."""

    def __init__(self, reader, model, done=None, tries=None, prefix=None):
        self.keys = RowKeys(b"salt")
        self.done = done or KeyTable(with_values=True)
        start, files = Position() if prefix is None else prefix.end, reader.files
        recipe = Recipe(
            reader.config, reader.form_name, files, b"salt", model.portable(), self.done.keys_only(), start
        )  # fmt: skip
        self.tables = list(prepared_tables(recipe))
        tools = Future()
        tools.set_result(model.tools(128))
        names = [file.name for file in files]
        duplicates = Duplicates(self.keys, None if prefix is None else prefix.ids)
        self.intake = Intake(
            lambda: (table for table in self.tables), names, duplicates, self.done, tries or {}, tools, prefix
        )

    def chunks(self):
        return [self.intake.chunk(found) for found in self.intake.scanned()]


def test_rows_arrive_as_they_stand(write, reader, model):
    source = reader(write("in.jsonl", LINES))
    (chunk,) = Stages(source, model).chunks()
    assert chunk.num_rows == len(LINES)
    faults = {row.index: (row.fault.stage, row.fault.code) for row in chunk.settled}
    assert faults == {
        1: ("read", "invalid_json"),
        2: ("parameters", "invalid_parameter"),
        3: ("validate", "duplicate_id"),
        5: ("validate", "missing_column"),
        7: ("tokenize", "invalid_prompt"),
    }
    assert [work.index for work in chunk.work] == [0, 4, 6]
    assert [work.row_id for work in chunk.work] == ["a", "\ud800", "in.jsonl:7"]
    assert chunk.work[2].row.token_ids == [5, 6, 7]
    assert [work.size for work in chunk.work] == [1, 1, 2]
    scanned = {row.index: row for row in source.rows()}
    for row in [*chunk.work, *chunk.settled]:
        assert (row.row_id, row.key) == (scanned[row.index].row_id, scanned[row.index].key)


def test_rows_that_are_done_are_not_made_ready_again(write, reader, model):
    source = reader(write("in.jsonl", LINES))
    first = Stages(source, model)
    (chunk,) = first.chunks()
    done = KeyTable(with_values=True)
    done.add(chunk.work[0].key, 40)
    tries = {chunk.work[1].key: Tries(in_company=1)}
    again = Stages(source, model, done, tries)
    assert again.tables[0]["token_ids"].to_pylist()[0] is None
    (chunk,) = again.chunks()
    assert [(row.index, row.location) for row in chunk.settled if row.fault is None] == [(0, 40)]
    assert [(work.index, work.tries.in_company) for work in chunk.work] == [(4, 1), (6, 0)]


def test_many_rows_keep_their_numbers(write, reader, model):
    rows = [{"id": str(i), "prompt": f"p {i}"} for i in range(1300)]
    stages = Stages(reader([write("a.jsonl", rows[:700]), write("b.jsonl", rows[700:])]), model)
    chunks = stages.chunks()
    assert [work.row_id for chunk in chunks for work in chunk.work] == [str(i) for i in range(1300)]
    assert [work.index for chunk in chunks for work in chunk.work] == list(range(1300))
    assert max(chunk.num_rows for chunk in chunks) <= 256


@pytest.mark.parametrize("head_rows", [1, 40, 1024])
def test_a_prefix_is_not_read_again(write, reader, model, monkeypatch, head_rows):
    """What comes after it is as if all had been read: numbers, ids that were there before, the files after its own."""
    monkeypatch.setattr(pipeline, "_HEAD_ROWS", head_rows)
    rows = [{"id": str(i), "prompt": f"p {i}"} for i in range(900)]
    rows[800]["id"] = "7"
    source = reader([write("a.jsonl", rows[:300]), write("b.jsonl", rows[300:600]), write("c.jsonl", rows[600:])])
    whole = Stages(source, model).chunks()
    for cut in range(len(whole)):
        end = whole[cut].end
        ids = KeyTable(with_values=False)
        ids.extend(b"".join(id_hash(str(i)) for i in range(end.index)))
        part = Stages(source, model, prefix=Prefix(end, np.arange(end.index) << 1, ids))
        assert sum(table.num_rows for table in part.tables) == 900 - end.index
        left_in_file = 300 - end.line
        if left_in_file:
            assert part.tables[0].num_rows == min(head_rows, left_in_file)
        settled, *rest = part.chunks()
        assert settled.known.values.tolist() == [i << 1 for i in range(end.index)]
        assert (settled.num_rows, list(settled.known.indices)) == (end.index, list(range(end.index)))
        assert (settled.settled, settled.work) == ([], [])
        assert settled.end == Position(), "the ledger has it already"
        expected = [(work.index, work.key) for chunk in whole[cut + 1 :] for work in chunk.work]
        assert [(work.index, work.key) for chunk in rest for work in chunk.work] == expected
        if end.index <= 800:
            (fault,) = (row for chunk in rest for row in chunk.settled)
            assert (fault.index, fault.fault.code) == (800, "duplicate_id")


def test_an_engine_that_takes_less_than_the_model(write, reader, model):
    stages = Stages(reader(write("in.jsonl", [{"prompt": "x" * 60}, {"prompt": "y"}])), model)
    tools = Future()
    tools.set_result(model.tools(32))
    stages.intake._tools = tools
    (chunk,) = stages.chunks()
    assert [work.index for work in chunk.work] == [1]
    assert (chunk.settled[0].fault.stage, chunk.settled[0].fault.code) == ("tokenize", "invalid_prompt")


def test_lines_survive_packing():
    table = pipeline.pack_lines(3, [])
    assert list(lines_of(table)) == []
    assert pa.types.is_large_binary(table.schema.field("raw").type)


def test_input_in_this_process_alone_is_refused(model):
    file = SimpleNamespace(name="m.jsonl", filesystem=SimpleNamespace(protocol=("memory",)))
    with pytest.raises(ValueError, match=r"m\.jsonl' is in the memory of this process"):
        next(prepared_tables(Recipe(None, "rows", [file], b"", model, KeyTable(with_values=False), Position())))
