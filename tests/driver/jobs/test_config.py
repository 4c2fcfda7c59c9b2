import re
from pathlib import Path

import pytest

from shoal.driver.jobs.config import JobConfig, load_job, make_job
from shoal.driver.jobs.outcome import Exit

BASE = {"input": "in.jsonl", "output": "out.jsonl", "engine": {"model": "m"}}


def test_defaults_and_lists():
    job = make_job(BASE)
    assert job.input == ["in.jsonl"]
    assert not job.is_folder
    assert job.error_limit(100) == float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nonsense": 1}, "nonsense: Extra inputs"),
        ({"output": "out.txt"}, r"output must end in .jsonl, .parquet or /, got 'out.txt'"),
        ({"output": " "}, "output must name a file"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"replicas": 0}, r'replicas must be a number from 1 on, or "auto", got 0'),
        ({"max_errors": "many"}, "max_errors must be a number of rows"),
        ({"max_errors": "-1"}, "max_errors"),
        ({"max_errors": "1.5"}, "max_errors"),
        ({"max_errors": "nan%"}, "max_errors"),
        ({"max_errors": "inf%"}, "max_errors"),
        ({"engine": {"modle": "m"}}, "model is missing"),
        ({"engine": {"model": "m", "max_num_seq": 2}}, "unknown engine argument 'max_num_seq'; did you mean"),
        ({"prompt_column": ""}, "prompt_column must name a column"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        make_job({**BASE, **fields})


def test_error_limits():
    assert make_job({**BASE, "max_errors": 7}).error_limit(1000) == 7
    assert make_job({**BASE, "max_errors": "2.5%"}).error_limit(1000) == 25


def test_folder_output(tmp_path):
    assert make_job({**BASE, "output": "answers/"}).is_folder
    assert make_job({**BASE, "output": str(tmp_path)}).is_folder
    assert not make_job({**BASE, "output": "x", "output_format": "parquet"}).is_folder


def test_a_file_and_changes_over_it(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("input: [a.jsonl, b.jsonl]\noutput: o.jsonl\nengine: {model: m, seed: 3, max_num_seqs: 5}\n")
    job = load_job(str(path), {"output": "other.jsonl", "engine": {"seed": 4}})
    assert job.input == ["a.jsonl", "b.jsonl"]
    assert job.output == "other.jsonl"
    assert (job.engine.seed, job.engine.max_num_seqs) == (4, 5)
    for text in ("[1]", "{", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="job file"):
            load_job(str(path), {})
    with pytest.raises(ValueError, match="cannot be read"):
        load_job(str(tmp_path / "none.yaml"), {})


def test_the_manual_lists_every_flag():
    manual = (Path(__file__).resolve().parents[3] / "docs" / "jobs.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in manual.splitlines() if line.startswith("| `-")}
    for name, field in JobConfig.model_fields.items():
        if name == "engine":
            continue
        line = next(row for flag, row in rows.items() if f"`--{name.replace('_', '-')}`" in flag)
        assert " ".join(field.description.split()) in line
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            assert f"| {'none' if default is None else default} |" in line
    assert set(map(str, map(int, Exit))) <= set(re.findall(r"\b\d+\b", manual.partition("| code |")[2][:1500]))
