"""Output files from a ledger."""

import json
import logging
import os
from dataclasses import replace

import fsspec
import pyarrow.parquet as pq
import pytest

from shoal.driver.jobs.json_text import dump
from shoal.driver.jobs.keys import Numbers
from shoal.driver.jobs.parts import Parts
from shoal.driver.jobs.publish import Publisher, plan_output
from shoal.driver.jobs.sinks import parquet
from shoal.driver.jobs.state.ledger import Ledger, SupersededError
from shoal.driver.jobs.state.open_store import open_store

ERROR = {"code": "c", "stage": "s", "message": "m"}


@pytest.fixture
def published(job, tmp_path):
    """published(output, rows, ...) -> what `Publisher` needs; rows in completion order, as (index, row, is_error)."""

    def make(output, rows, *, separate=False, **fields):
        config = job("in.jsonl", output=output, **fields)
        plan = plan_output(config, "jsonl", separate)
        store = open_store(plan.filesystem, plan.state_path, local=plan.local, rows=10, seconds=10)
        ledger, where = Ledger(store), Numbers()
        for index, row, is_error in rows:
            meta = {"t": "err" if is_error else "ok", "id": str(index), "key": "00" * 12, "index": index}
            where[index] = ledger.append(meta | {"code": "bad_row", "usage": [1, 1, 0]}, dump(row))
        ledger.sync()
        return Publisher(plan, ledger, where, config.order), plan, store

    return make


ROWS = [(2, {"n": 2}, False), (0, {"n": 0}, False), (1, {"n": 1, "error": ERROR}, True), (4, {"n": 4}, False)]


def read(path):
    return [json.loads(line)["n"] for line in open(path, encoding="utf-8")]


def test_orders_and_error_files(published, tmp_path):
    out = str(tmp_path / "a.jsonl")
    publisher, plan, _ = published(out, ROWS)
    assert plan.state_path == out + ".shoal"
    assert publisher.publish(5) == [out]
    assert read(out) == [0, 1, 2, 4]
    out = str(tmp_path / "b.jsonl")
    published(out, ROWS, order="completion")[0].publish(5)
    assert read(out) == [2, 0, 1, 4]
    out = str(tmp_path / "c.jsonl")
    assert published(out, ROWS, separate=True)[0].publish(5) == [out, str(tmp_path / "c.errors.jsonl")]
    assert (read(out), read(tmp_path / "c.errors.jsonl")) == ([0, 2, 4], [1])
    out, bad = str(tmp_path / "d.jsonl"), str(tmp_path / "deep" / "bad.jsonl")
    published(out, ROWS, error_output=bad)[0].publish(5)
    assert (read(out), read(bad)) == ([0, 2, 4], [1])


def test_parts_of_a_folder(published, tmp_path):
    publisher, plan, _ = published(f"{tmp_path}/parts/", ROWS, separate=True)
    assert plan.state_path == f"{tmp_path}/parts/_shoal"
    assert publisher.publish_part(0, 0, 3) == [
        f"{tmp_path}/parts/part-00000.jsonl",
        f"{tmp_path}/parts/_errors/part-00000.jsonl",
    ]
    assert read(tmp_path / "parts" / "part-00000.jsonl") == [0, 2]
    publisher.publish_part(1, 3, 6)
    assert read(tmp_path / "parts" / "part-00001.jsonl") == [4]
    assert read(tmp_path / "parts" / "_errors" / "part-00001.jsonl") == []


SIX = [(n, {"n": n}, False) for n in (3, 0, 1, 2, 5, 4)]


def folder_of(path):
    """Rows by the parts that are there."""
    return {name: read(path / name) for name in sorted(os.listdir(path)) if name.endswith(".jsonl")}


def run(made, rows_per_part=2, order="input", num_rows=6):
    """A run that meets all rows and ends: the parts that it wrote."""
    publisher, plan, store = made
    written, inner = [], publisher.publish_part
    publisher.publish_part = lambda number, *span: written.append(number) or inner(number, *span)
    parts = Parts(plan, publisher, store, rows_per_part, order)
    parts.settled(range(num_rows))
    assert parts.finish(num_rows) == -(-num_rows // rows_per_part)
    return written


def again(made, rows=()):
    """The same state in another run: its ledger, with these rows settled anew."""
    _, plan, store = made
    ledger, where = Ledger(store), Numbers()
    for records in ledger.records():
        for row in records.rows:
            where[int(row["index"])] = int(row["value"]) >> 1
    for index, row, is_error in rows:
        meta = {"t": "err" if is_error else "ok", "id": str(index), "key": "00" * 12, "index": index}
        where[index] = ledger.append(meta | {"code": "bad_row", "usage": [1, 1, 0]}, dump(row))
    ledger.sync()
    return Publisher(plan, ledger, where, "input"), plan, store


def test_parts_are_written_again_only_where_their_rows_are_others(published, tmp_path):
    made = published(f"{tmp_path}/parts/", SIX)
    assert run(made) == [0, 1, 2]
    made = again(made)
    assert run(made) == []
    made = again(made, [(3, {"n": 33}, False)])
    assert run(made) == [1]
    assert folder_of(tmp_path / "parts")["part-00001.jsonl"] == [2, 33]
    os.unlink(tmp_path / "parts" / "part-00002.jsonl")
    assert run(again(made)) == [2]


def test_a_run_that_ends_before_the_part_is_written(published, tmp_path):
    """A row's new answer is durable, the part still shows the old one: the next run writes it, as it is."""
    made = published(f"{tmp_path}/parts/", SIX)
    run(made)
    made = again(made, [(5, {"n": 55}, False)])
    made = again(made)  # nothing new
    assert run(made) == [2]
    assert folder_of(tmp_path / "parts")["part-00002.jsonl"] == [4, 55]


def test_a_part_half_way_to_its_new_content_is_not_trusted(published, tmp_path):
    made = published(f"{tmp_path}/parts/", SIX)
    run(made)
    publisher, plan, store = again(made, [(0, {"n": 100}, False)])
    parts = Parts(plan, publisher, store, 2, "input")
    parts.settled([0, 1])  # written over, and then the run is killed
    assert folder_of(tmp_path / "parts")["part-00000.jsonl"] == [100, 1]
    old = again(made)
    old[0]._where[0] = made[0]._where.slice(0, 1)[0]  # the row is what it was
    assert run(old) == [0]
    assert folder_of(tmp_path / "parts")["part-00000.jsonl"] == [0, 1]


@pytest.mark.parametrize(("size", "count"), [(3, 2), (1, 6), (4, 2), (100, 1)])
def test_parts_of_another_size(size, count, published, tmp_path):
    made = published(f"{tmp_path}/parts/", SIX)
    run(made)
    assert len(run(again(made), rows_per_part=size)) == count
    found = folder_of(tmp_path / "parts")
    assert [n for rows in found.values() for n in rows] == [0, 1, 2, 3, 4, 5]
    assert len(found) == count


def test_parts_in_another_format_or_order(published, tmp_path):
    """Those of before go; what is not a part of the job's stays."""
    made = published(f"{tmp_path}/parts/", SIX)
    run(made)
    (tmp_path / "parts" / "part-of-mine.jsonl").write_text('{"n": -1}')
    publisher, plan, store = again(made)
    plan = replace(plan, format="parquet")
    publisher._plan = plan
    assert run((publisher, plan, store)) == [0, 1, 2]
    names = sorted(os.listdir(tmp_path / "parts"))
    assert names == ["_shoal", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "part-of-mine.jsonl"]
    assert run((publisher, plan, store), order="completion") == [0, 1, 2]


def test_parquet_has_one_schema(published, tmp_path):
    out = str(tmp_path / "a.parquet")
    rows = [
        (0, {"n": 1, "generated_text": "x", "error": None, "params": {}, "nested": [{"a": None}]}, False),
        (1, {"n": 2.5, "generated_text": None, "error": ERROR, "params": {"t": {}}, "late": "y"}, True),
        (2, {"n": None, "nested": [{"a": 1, "b": "z"}], "nothing": None}, False),
    ]
    published(out, rows)[0].publish(3)
    found = pq.read_table(out).to_pylist()
    assert [row["n"] for row in found] == [1, 2.5, None]
    assert found[1]["error"] == ERROR
    assert found[2]["nested"] == [{"a": 1, "b": "z"}]
    assert (found[0]["params"], found[1]["params"]) == ("{}", '{"t": {}}')
    assert (found[0]["late"], found[1]["late"], found[0]["nothing"]) == (None, "y", None)
    many = [(i, {"n": i, "generated_text": "x"}, False) for i in range(10_000)]
    published(out, many)[0].publish(10_000)
    assert pq.read_table(out, columns=["n"])["n"].to_pylist() == list(range(10_000))
    published(str(tmp_path / "empty.parquet"), [])[0].publish(0)
    assert pq.read_table(tmp_path / "empty.parquet").num_rows == 0


def test_parquet_has_json_text_where_no_type_fits(published, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 2)
    parquet._warn.cache_clear()
    columns = {
        "meta": [1, "t", None, [1, "ö"], {"a": 1}],
        "late": [1, 2, 3, 4, "x"],  # another group's values show it
        "big": [1, 2, 2**70, 4, 5],
        "inner": [{"a": 1}, {"b": 2}, {"a": 3}, {"a": "x"}, None],
        "seen_in_writing": [2**53 + 1, 1, 2, 3, 0.5],
        "flag": [True, False, 1, 0, None],
        "flag_after_fraction": [0.5, True, 1, 2, None],
        "fits": [1, 2, 3, 4, 0.5],
    }
    rows = [(i, {name: values[i] for name, values in columns.items()}, False) for i in range(5)]
    out = str(tmp_path / "a.parquet")
    with caplog.at_level(logging.WARNING):
        published(out, rows)[0].publish(5)
        published(out, rows)[0].publish(5)
    found = pq.read_table(out)
    assert found["meta"].to_pylist() == ["1", '"t"', None, '[1, "ö"]', '{"a": 1}']
    for name, values in columns.items():
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        assert found[name].to_pylist() == (values if name == "fits" else texts), name
        assert caplog.text.count(f"column {name!r}") == (name != "fits")


def test_parquet_has_replacement_characters_for_lone_surrogates(published, tmp_path):
    row = {"prompt": "bad \ud800, good \U0001f600", "deep": [{"key \udfff": "\\ud800 \ud800"}], "c\ud800": "x"}
    out = str(tmp_path / "a.parquet")
    published(out, [(0, row, False)])[0].publish(1)
    (found,) = pq.read_table(out, columns=["prompt", "deep", "c\ufffd"]).to_pylist()
    assert found == {
        "prompt": "bad \ufffd, good \U0001f600",
        "deep": [{"key \ufffd": "\\ud800 \ufffd"}],
        "c\ufffd": "x",
    }
    out = str(tmp_path / "a.jsonl")
    published(out, [(0, row, False)])[0].publish(1)
    assert json.loads((tmp_path / "a.jsonl").read_text()) == row


def test_an_object_store(published):
    publisher, plan, _ = published("memory://out/a.jsonl", ROWS, separate=True)
    publisher.publish(5)
    files = fsspec.filesystem("memory")
    assert [json.loads(line)["n"] for line in files.cat_file("/out/a.jsonl").splitlines()] == [0, 2, 4]
    assert files.exists("/out/a.errors.jsonl")
    assert not plan.local


def test_only_the_owner_publishes(published, tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text("as it was")
    publisher, _, store = published(str(out), ROWS)
    Ledger(store)
    with pytest.raises(SupersededError):
        publisher.publish(5)
    assert out.read_text() == "as it was"
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.shoal"]


def test_partial_results_stand_beside_the_state(published, tmp_path):
    out = str(tmp_path / "a.jsonl")
    published(out, ROWS)[0].publish_partial(5)
    assert read(out + ".shoal/partial.jsonl") == [0, 1, 2, 4]
    assert not os.path.exists(out)


def test_outputs_that_cannot_be(job, tmp_path):
    for fields, message in (
        ({"output": "nonsense://x/a.jsonl"}, "cannot be opened"),
        ({"output": str(tmp_path), "output_format": "jsonl", "error_output": "x.jsonl"}, "error_output"),
        ({"output": "a.jsonl", "error_output": "memory://x.jsonl"}, "error_output must be on the store"),
        ({"output": "a.jsonl", "error_output": "./x/../a.jsonl"}, "error_output must be another file than output"),
        ({"output": "memory://a.jsonl", "error_output": "memory://a.jsonl"}, "error_output must be another file"),
        ({"output": "a.jsonl", "error_output": "a.jsonl.shoal/e.jsonl"}, "error_output must not be in the job's state"),
        ({"output": "a.jsonl", "error_output": str(tmp_path)}, "error_output must name a file, got the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_output(job("in.jsonl", **fields), "jsonl", False)
    folder = tmp_path / "x.jsonl"
    folder.mkdir()
    with pytest.raises(ValueError, match="is a folder: end it in /"):
        plan_output(job("in.jsonl", output=str(folder)), "jsonl", False)
