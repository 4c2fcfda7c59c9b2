"""A job's output beside its input: what is left out, what is refused, and what cannot be created."""

import json
import os

import fsspec
import pytest

from shoal.driver.cli import main
from shoal.driver.jobs.own_files import job_inputs, make_folders, refuse_inputs
from shoal.driver.jobs.publish import plan_output

ROWS = [{"prompt": "x"}]


@pytest.fixture
def names(job):
    """names(input, **fields) -> the input files' names, after what a job refuses before it writes anything."""

    def make(source, separate=False, **fields):
        config = job(source, **fields)
        files = job_inputs(config)
        refuse_inputs(config, plan_output(config, files[0].format, separate), files)
        return [file.name for file in files]

    return make


def ran(write, state, form="rows"):
    """What an earlier run left in its state."""
    write(f"{state}/job.json", [{"identity": {"parameters": {"form": form}}}])
    write(f"{state}/partial.jsonl", ROWS)


def test_an_output_over_the_input_is_refused(names, write, tmp_path, monkeypatch):
    path, other = write("d/x.jsonl", ROWS), write("d/y.jsonl", ROWS)
    link = str(tmp_path / "link.jsonl")
    os.symlink(path, link)
    monkeypatch.chdir(tmp_path / "d")
    for source, fields in (
        (path, {"output": path}),
        (path, {"output": "x.jsonl"}),
        ([other, link], {"output": path}),
        (str(tmp_path / "d"), {"output": path}),  # of no earlier run: it is the user's
        (str(tmp_path / "d" / "*.jsonl"), {"output": path}),
        (path, {"output": str(tmp_path / "out.jsonl"), "error_output": path}),
    ):
        with pytest.raises(ValueError, match=r"input '.*(x|link)\.jsonl' is also the (error )?output of this job"):
            names(source, **fields)
    errors = write("d/z.errors.jsonl", ROWS)
    assert names(errors, output="z.jsonl") == ["z.errors.jsonl"]
    with pytest.raises(ValueError, match="is also the error output"):
        names(errors, separate=True, output="z.jsonl")
    assert main(["run-batch", "-i", path, "-o", path, "--model", "some/model"]) == 2
    assert json.loads((tmp_path / "d" / "x.jsonl").read_text()) == ROWS[0]
    assert sorted(os.listdir(tmp_path / "d")) == ["x.jsonl", "y.jsonl", "z.errors.jsonl"]
    state = write("w.jsonl.shoal/partial.jsonl", ROWS)
    with pytest.raises(ValueError, match="is also in the state of this job"):
        names(state, output=str(tmp_path / "w.jsonl"))


def test_parts_over_the_input_are_refused(names, write, tmp_path):
    part = write("d/part-00000.jsonl", ROWS)
    for source in (part, str(tmp_path / "d")):
        with pytest.raises(ValueError, match="is also a part of the output"):
            names(source, output=f"{tmp_path}/d/")
    assert names(part, output=f"{tmp_path}/other/") == ["part-00000.jsonl"]
    for name, role in (("_errors/part-00000.jsonl", "the error output"), ("_shoal/partial.jsonl", "in the state")):
        with pytest.raises(ValueError, match=f"is also {role} of this job"):
            names(write(f"d/{name}", ROWS), separate=True, output=f"{tmp_path}/d/")


def test_the_same_command_finds_the_same_input(names, write, tmp_path):
    """What a run has written into the folder of its input is not read by the next one."""
    for name in ("d/b.jsonl", "d/a.jsonl", "d/deep/part-00000.jsonl"):
        write(name, ROWS)
    folder, pattern, output = str(tmp_path / "d"), f"{tmp_path}/d/**/*.jsonl", f"{tmp_path}/d/answers.jsonl"
    expected = ["a.jsonl", "b.jsonl", "deep/part-00000.jsonl"]
    assert names(folder, output=output) == names(pattern, output=output) == expected
    write("d/answers.jsonl", ROWS)
    write("d/bad.jsonl", ROWS)
    ran(write, "d/answers.jsonl.shoal")
    for source in (folder, pattern):
        assert names(source, output=output, error_output=f"{tmp_path}/d/bad.jsonl") == expected
    with pytest.raises(ValueError, match="is also the output"):
        names([folder, output], output=output)
    os.unlink(tmp_path / "d" / "bad.jsonl")
    write("d/answers.errors.jsonl", ROWS)  # the job's own only where its form puts errors there
    assert names(folder, output=output) == ["a.jsonl", "answers.errors.jsonl", "b.jsonl", "deep/part-00000.jsonl"]
    ran(write, "d/answers.jsonl.shoal", form="openai")
    assert names(folder, separate=True, output=output) == expected


def test_a_folder_output_inside_the_input(names, write, tmp_path):
    write("d/a.jsonl", ROWS)
    for output in (f"{tmp_path}/d/out/", f"{tmp_path}/d/"):
        for name in ("part-00000.jsonl", "part-00001.jsonl", "_errors/part-00000.jsonl"):
            write(f"{output.removeprefix(f'{tmp_path}/')}{name}", ROWS)
        ran(write, f"{output.removeprefix(f'{tmp_path}/')}_shoal")
        source = f"{tmp_path}/d/*.jsonl" if output.endswith("/d/") else f"{tmp_path}/d"
        assert names(source, output=output) == ["a.jsonl"]


def test_an_object_store(names):
    files = fsspec.filesystem("memory")
    for name in ("a.jsonl", "answers.jsonl", "answers.jsonl.shoal/partial.jsonl"):
        files.pipe_file(f"/own/{name}", b'{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="is also the output"):
        names("memory://own", output="memory://own/answers.jsonl")
    files.pipe_file("/own/answers.jsonl.shoal/job.json", b'{"identity": {"parameters": {"form": "rows"}}}')
    assert names("memory://own", output="memory://own/answers.jsonl") == ["a.jsonl"]


def test_outputs_that_cannot_be_created(write, job, tmp_path, capsys):
    path = write("small.jsonl", ROWS)
    for fields, message in (
        ({"output": f"{path}/x.jsonl"}, f"'{path}/x.jsonl' cannot be created: a file is where .*'{path}'"),
        ({"output": f"{path}/deep/"}, "cannot be created: a file is where it needs the folder"),
        ({"output": "/proc/nope/x.jsonl"}, "'/proc/nope/x.jsonl' cannot be created: no folder '/proc/nope'"),
        ({"error_output": "/proc/nope/e.jsonl"}, "'/proc/nope/e.jsonl' cannot be created"),
    ):
        with pytest.raises(ValueError, match=message):
            make_folders(plan_output(job(path, **fields), "jsonl", False))
    write("taken.jsonl.shoal", ROWS)
    with pytest.raises(ValueError, match=r"it needs the folder '.*taken\.jsonl\.shoal'"):
        make_folders(plan_output(job(path, output=f"{tmp_path}/taken.jsonl"), "jsonl", False))
    assert main(["run-batch", "-i", path, "-o", f"{path}/x.jsonl", "--model", "some/model"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
