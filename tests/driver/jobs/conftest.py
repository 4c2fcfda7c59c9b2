"""Jobs that only read: configs and files."""

import json

import pytest

from shoal.driver.jobs.config import make_job
from shoal.driver.jobs.files import with_columns
from shoal.driver.jobs.forms.base import make_form
from shoal.driver.jobs.keys import RowKeys
from shoal.driver.jobs.own_files import job_inputs
from shoal.driver.jobs.scan import Scanner, detect_form, raw_rows, validate


@pytest.fixture
def write(tmp_path):
    """write(name, lines) -> path; a line may be bytes, text or an object."""

    def make(name, lines):
        raw = [
            line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
            for line in lines
        ]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n".join(raw) + b"\n")
        return str(path)

    return make


@pytest.fixture
def job(tmp_path):
    """job(input, **fields) -> JobConfig."""

    def make(source, **fields):
        engine = fields.pop("engine", {"model": "some/model"})
        return make_job({"input": source, "output": str(tmp_path / "out.jsonl"), "engine": engine, **fields})

    return make


class Reader:
    """A job's input, as the job reads it."""

    def __init__(self, config):
        self.config = config
        self.files = job_inputs(config)
        form = detect_form(self.files, config.max_line_bytes) if config.form == "auto" else config.form
        self.form_name, self.form = form, make_form(form, config)
        self.files = with_columns(self.files, self.form.reads())

    def scanner(self):
        return Scanner(self.form, RowKeys(b"salt"))

    def rows(self):
        return self.scanner().scan(list(raw_rows(self.files, self.config.max_line_bytes)))

    def validate(self):
        return validate(self.files, self.scanner(), self.config.validate_rows, self.config.max_line_bytes)


@pytest.fixture
def reader(job):
    """reader(input, **fields) -> Reader."""
    return lambda source, **fields: Reader(job(source, **fields))
