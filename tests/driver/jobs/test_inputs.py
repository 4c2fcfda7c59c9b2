"""Input files and rows: formats, what is wrong with them, ids and keys."""

import bz2
import datetime
import gzip
import json
import lzma
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.files import find_inputs
from shoal.driver.jobs.sources.registry import Start, parse_object, read_rows

GOOD = [{"id": str(i), "prompt": f"p{i}"} for i in range(5)]


NUMBERS = st.integers() | st.integers(10**17, 10**20) | st.floats(allow_nan=True, allow_infinity=True)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans(), st.integers(0, 200), st.binary(max_size=2))
def test_objects_are_read_as_the_standard_library_reads_them(columns, ascii_only, place, dirt):
    text = json.dumps(columns, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    for raw in (text, text[:place] + dirt + text[place:]):
        try:
            expected = json.loads(raw.decode("utf-8"))
        except ValueError:
            expected = None
        if not isinstance(expected, dict):
            with pytest.raises(RowError):
                parse_object(raw)
        else:
            assert repr(parse_object(raw)) == repr(expected)


def faults(rows):
    return {row.line: row.fault.code for row in rows if row.fault is not None}


def test_files_folders_globs_and_addresses(write, tmp_path):
    for name in ("d/b.jsonl", "d/a.jsonl", "d/deep/c.ndjson", "d/_state/x.jsonl", "d/.hidden.jsonl", "d/notes.txt"):
        write(name, GOOD)
    names = [file.name for file in find_inputs([str(tmp_path / "d")], "auto")]
    assert names == ["a.jsonl", "b.jsonl", "deep/c.ndjson"]
    assert [file.name for file in find_inputs([str(tmp_path / "d" / "?.jsonl")], "auto")] == ["a.jsonl", "b.jsonl"]
    assert [file.name for file in find_inputs([f"file://{tmp_path}/d/a.jsonl"], "auto")] == ["a.jsonl"]
    with fsspec.open("memory://in/m.jsonl", "wb") as file:
        file.write(b'{"prompt": "x"}\n')
    (memory,) = find_inputs(["memory://in/m.jsonl"], "auto")
    assert memory.open().read() == b'{"prompt": "x"}\n'


def test_addresses_that_lead_nowhere(write, tmp_path):
    path = write("d/notes.txt", GOOD)
    for address, message in (
        (str(tmp_path / "none.jsonl"), "does not exist"),
        (str(tmp_path / "*.jsonl"), "no such files"),
        (path, r"set input_format \(csv, jsonl, parquet\)"),
        ("nonsense://a/b.jsonl", "cannot be opened"),
    ):
        with pytest.raises(ValueError, match=message):
            find_inputs([address], "auto")
    assert find_inputs([path], "jsonl")[0].format == "jsonl"
    with pytest.raises(ValueError, match="twice"):
        find_inputs([path, path], "jsonl")


def test_identity_sees_both_ends_and_the_size(write):
    lines = [{"prompt": "x" * 1000, "n": i} for i in range(1000)]
    before = find_inputs([write("a.jsonl", lines)], "auto")[0].identity()
    assert find_inputs([write("a.jsonl", lines)], "auto")[0].identity() == before
    for changed in ([{"other": 1}, *lines[1:]], [*lines[:-1], {"other": 1}], [*lines, {"one": "more"}]):
        assert find_inputs([write("a.jsonl", changed)], "auto")[0].identity() != before


def test_jsonl_faults_have_their_line(write, reader):
    lines = [
        GOOD[0],
        "not json",
        b'{"id": "u", "prompt": "\xff"}',
        "",
        "[1]",
        '{"id": "long", "prompt": "' + "x" * 300 + '"}',
        {"id": "0", "prompt": "again"},
        {"id": "7"},
        {"id": True, "prompt": "x"},
        {"id": 8, "prompt": "x"},
        "",
        "  ",
    ]
    found = reader(write("a.jsonl", lines), max_line_bytes=200)
    rows = found.rows()
    assert faults(rows) == {
        2: "invalid_json", 3: "invalid_utf8", 4: "blank_line", 5: "not_an_object", 6: "line_too_long",
        7: "duplicate_id", 8: "missing_column", 9: "invalid_id",
    }  # fmt: skip
    assert [row.line for row in rows] == [*range(1, 11)]
    assert len({row.row_id for row in rows}) == len({row.key for row in rows}) == 10
    report = str(found.validate())
    assert "8 of 10 rows cannot be used" in report
    assert "a.jsonl:7: the id '0' was there before" in report
    assert "byte 24 of the line is not UTF-8" in report


def test_a_long_line_costs_no_memory(tmp_path, reader):
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        for _ in range(11):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"prompt": "after"}\n')
    bad, good = reader(str(path)).rows()
    assert bad.fault.code == "line_too_long"
    assert (good.columns, good.line) == ({"prompt": "after"}, 2)


def test_validation_stops_at_its_limit(write, reader):
    path = write("a.jsonl", [*GOOD, "bad"])
    found = reader(path, validate_rows=3).validate()
    assert (found.num_rows, found.num_faults, found.complete) == (3, 0, False)
    found = reader(path, validate_rows=6).validate()
    assert (found.num_rows, found.num_faults, found.complete) == (6, 1, True)


def test_csv(tmp_path, reader):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,prompt,sampling_params\n007,"two\nlines, ""q""",\n008,b,{}\n\nshort,row\n9,\xff,\n10,last,\n'
    )
    rows = reader(str(path)).rows()
    assert faults(rows) == {6: "invalid_csv", 7: "invalid_utf8"}
    assert rows[0].row_id == "007"
    assert rows[0].columns["prompt"] == 'two\nlines, "q"'
    assert [row.line for row in rows] == [2, 4, 6, 7, 8]
    path.write_text("id,id\n1,2\n")
    with pytest.raises(ValueError, match="names a column twice"):
        reader(str(path)).rows()


def test_an_empty_cell_of_csv_is_not_given(tmp_path, reader):
    """Where a row may leave a column out, CSV has no other way to do so."""
    path = tmp_path / "a.csv"
    path.write_text(
        "id,prompt,messages,sampling_params,note\n"
        'a,p,,,\n,q,,"{""n"": 2}",x\nc,,"[{""role"": ""user"", ""content"": ""hi""}]",,\nd,,,,\n'
    )
    found = reader(str(path))
    rows = found.rows()
    assert [row.row_id for row in rows] == ["a", "a.csv:3", "c", "d"]
    assert faults(rows) == {5: "missing_column"}
    asked = [found.form.request(row.columns) for row in rows[:3]]
    assert [(one.prompt, one.sampling) for one in asked] == [("p", {}), ("q", {"n": 2}), (None, {})]
    assert asked[2].messages == [{"role": "user", "content": "hi"}]
    assert rows[0].columns["note"] == ""
    assert found.form.failure(rows[1].row_id, rows[1].columns, Fault("c", "s", "m"))["id"] == "a.csv:3"
    path.write_text("key,prompt\n,x\nk,\n")
    found = reader(str(path), id_column="key")
    rows = found.rows()
    assert faults(rows) == {2: "missing_column"}
    assert found.form.request(rows[1].columns).prompt == ""  # there are no messages beside it
    (path.parent / "b.jsonl").write_text('{"id": "", "prompt": "x"}\n')
    assert faults(reader(str(path.parent / "b.jsonl")).rows()) == {1: "invalid_id"}


def test_parquet(tmp_path, reader):
    path = str(tmp_path / "a.parquet")
    when = datetime.datetime(2026, 1, 2)
    messages = [{"role": "user", "content": "hi", "name": None}]
    pq.write_table(pa.Table.from_pylist([{"id": i, "messages": messages, "when": when} for i in range(600)]), path)
    rows = reader(path).rows()
    assert [row.row_id for row in rows] == [str(i) for i in range(600)]
    assert rows[0].columns["when"] == "2026-01-02T00:00:00"
    pq.write_table(pa.table({"prompt": ["a"], "blob": [b"\x00"]}), path)
    (row,) = reader(path).rows()
    assert row.fault.code == "invalid_value"
    assert "column 'blob': a value of type bytes" in row.fault.message
    assert "name the columns to keep (columns), without it" in row.fault.message
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        reader(str(tmp_path / "b.parquet")).rows()


def test_parquet_columns_that_nothing_asks_for_are_not_read(tmp_path, reader):
    path = str(tmp_path / "a.parquet")
    columns = {"id": ["i"], "prompt": ["p"], "sampling_params": ["{}"], "title": ["t"], "blob": [b"\x00"]}
    pq.write_table(pa.table(columns | {"a": [{"b": 1, "c": b"\x00"}], "a.b": ["dotted"]}), path)
    (row,) = reader(path, columns=["title", "a.b"]).rows()
    assert row.fault is None
    assert row.columns == {"id": "i", "prompt": "p", "sampling_params": "{}", "title": "t", "a.b": "dotted"}
    (row,) = reader(path, columns=["title", "blob"]).rows()
    assert "column 'blob'" in row.fault.message
    (row,) = reader(path, columns=[], prompt_template="{{ title }}{% if a is defined %}!{% endif %}").rows()
    assert "column 'a'" in row.fault.message
    found = reader(path, columns=[], id_column="title", prompt_template="{{ title }}")
    (row,) = found.rows()
    assert (row.row_id, row.fault, found.form.request(row.columns).prompt) == ("t", None, "t")
    (row,) = reader(path, columns=[], prompt_column="body").rows()
    assert row.fault.code == "missing_column"


def test_compressed(tmp_path, reader):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in GOOD)))
    assert [row.columns for row in reader(str(path)).rows()] == GOOD


@pytest.mark.parametrize(("ending", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_a_broken_compressed_file_is_named(tmp_path, reader, ending, module):
    path = tmp_path / f"a.jsonl.{ending}"
    whole = module.compress(b"\n".join(b'{"prompt": "%d"}' % i for i in range(500)))
    for data in (b'{"prompt": "as it stands"}\n', whole[:-20]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"input '{path}' cannot be decompressed: it is no whole"):
            reader(str(path)).rows()


def test_keys_follow_the_row_where_it_has_an_id(write, reader):
    before = {row.row_id: row.key for row in reader(write("a.jsonl", GOOD)).rows()}
    moved = {row.row_id: row.key for row in reader(write("a.jsonl", [{"id": "new", "prompt": ""}, *GOOD])).rows()}
    assert {row_id: moved[row_id] for row_id in before} == before
    edited = reader(write("a.jsonl", [{**GOOD[0], "prompt": "other"}, *GOOD[1:]])).rows()
    assert [row.key == before[row.row_id] for row in edited] == [False, True, True, True, True]
    plain = reader(write("b.jsonl", [{"prompt": "same"}] * 3)).rows()
    assert [row.row_id for row in plain] == ["b.jsonl:1", "b.jsonl:2", "b.jsonl:3"]
    assert len({row.key for row in plain}) == 3


def test_an_id_column_that_is_named_must_be_there(write, reader):
    rows = reader(write("a.jsonl", [{"key": "k", "prompt": ""}, {"id": "i", "prompt": ""}]), id_column="key").rows()
    assert rows[0].row_id == "k"
    assert rows[1].fault.code == "missing_column"


def test_reading_is_lazy_and_quick(tmp_path, reader):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": "some words"}) + "\n" for i in range(50_000)))
    found = reader(str(path))
    started = time.perf_counter()
    assert found.validate().num_rows == 50_000
    assert time.perf_counter() - started < 5  # 0.3 s alone on its machine


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.csv", "in.parquet"])
def test_reading_from_any_row_on(write, tmp_path, name):
    """Every row says where it ends; from there on come the rows after it, with their own lines."""
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(600)]}), path)
    elif name.endswith("csv"):
        path.write_text("id,prompt\n" + "".join(f'{i},"p{i}\nover lines"\n' for i in range(20)) + "\n7\n8,last")
    else:
        lines = [
            b"\xef\xbb\xbf" + b'{"a": 1}',
            b"",
            b"   ",
            b"x" * 300,
            b"{}",
            b"\r",
            b'{"b": "' + b"y" * 2000 + b'"}',
            b"{}",
        ]
        data = b"\n".join(lines)
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (file,) = find_inputs([str(path)], "auto")
    rows = list(read_rows(file, 200))
    assert len(rows) > 5
    for place in range(0, len(rows), 1 if len(rows) < 100 else 77):
        assert list(read_rows(file, 200, Start(rows[place].line, rows[place].end))) == rows[place + 1 :]
