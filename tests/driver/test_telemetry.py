"""Names of metrics: those that the code publishes are those of the table, and the dashboard draws no others."""

import ast
import json
import re
from pathlib import Path

import pytest

from shoal.driver import telemetry
from shoal.driver.jobs.accounts import Accounts, Usage
from shoal.driver.jobs.telemetry import JobTelemetry
from shoal.driver.telemetry import ENGINE_METRICS, JOB_METRICS, METRICS, Publisher, exported_names

ROOT = Path(__file__).resolve().parents[2]
PUBLISHERS = {"driver/engine_telemetry.py": ENGINE_METRICS, "driver/jobs/telemetry.py": JOB_METRICS}


class Recorded:
    """In place of Ray's metric classes."""

    made = {}  # noqa: RUF012

    def __init__(self, name, description, boundaries=None, tag_keys=()):
        assert description
        self.name, self.tag_keys, self.values = name, tag_keys, []
        Recorded.made[name] = self

    def _record(self, value, tags):
        assert set(tags) == set(self.tag_keys)
        self.values.append((value, tags))

    set = inc = observe = _record


@pytest.fixture
def recorded(monkeypatch):
    from ray.util import metrics

    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, name, Recorded)
    Recorded.made = {}
    return Recorded.made


@pytest.mark.parametrize("path", PUBLISHERS)
def test_each_file_publishes_its_part_of_the_table(path):
    strings = {node.value for node in ast.walk(ast.parse((ROOT / path).read_text()))
               if isinstance(node, ast.Constant) and str(node.value).startswith("shoal_")}  # fmt: skip
    assert strings == set(PUBLISHERS[path])


def test_the_dashboard_draws_every_metric_and_no_other():
    dashboard = json.loads((ROOT / "docs/grafana/shoal.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    drawn = {name for one in expressions for name in re.findall(r"ray_shoal_\w+", one)}
    known = {exported: name for name in METRICS for exported in exported_names(name)}
    assert drawn <= set(known), "the code has no such metric"
    assert {known[name] for name in drawn} == set(METRICS), "a metric that nobody sees"
    for one in expressions:
        assert one.count("(") == one.count(")")
    queries = [str(one.get("query")) for one in dashboard["templating"]["list"]]
    assert {name for one in queries for name in re.findall(r"ray_shoal_\w+", one)} <= set(known)


def test_tags_in_the_dashboard_are_tags_of_the_metric():
    dashboard = json.loads((ROOT / "docs/grafana/shoal.json").read_text())
    text = json.dumps(dashboard)
    known = {exported: name for name in METRICS for exported in exported_names(name)}
    for exported, inside in re.findall(r"(ray_shoal_\w+)\{(.*?)\}", text):
        name = known[exported]
        common = ("job", "model") if name in JOB_METRICS else ("model", "engine")
        for tag in re.findall(r"(\w+)=", inside.replace('\\"', '"')):
            assert tag in common + METRICS[name].tags, exported


def test_a_total_goes_out_as_what_it_grew_by(recorded):
    publisher = Publisher({"model": "m", "engine": "e"})
    for total in (5, 5, 12):
        publisher.total("shoal_engine_steps", total)
    publisher.total("shoal_engine_finished_requests", 2, finish_reason="stop")
    publisher.total("shoal_engine_finished_requests", 3, finish_reason="length")
    assert [value for value, _ in recorded["shoal_engine_steps"].values] == [5, 7]
    assert [value for value, _ in recorded["shoal_engine_finished_requests"].values] == [2, 3]
    with pytest.raises(AssertionError, match="is a counter"):
        publisher.gauge("shoal_engine_steps", 1)


def test_a_job_publishes_its_accounts(recorded):
    accounts = Accounts(total_rows=10)
    job = JobTelemetry("out.jsonl", "m", accounts)
    accounts.answered(Usage(7, 3, 4), "stop")
    accounts.failed("invalid_prompt")
    accounts.generated["session"] = 8
    job.tick(2)
    job.tick(2)  # too soon
    rows = {tags["state"]: value for value, tags in recorded["shoal_job_rows"].values}
    assert rows == {"answered": 1, "failed": 1, "resumed": 0, "total": 10}
    assert recorded["shoal_job_errors"].values == [(1, {"job": "out.jsonl", "model": "m", "code": "invalid_prompt"})]
    assert recorded["shoal_job_wasted_tokens"].values[0][0] == 5
    assert recorded["shoal_job_engines"].values[0][0] == 2
    assert set(recorded) <= set(telemetry.JOB_METRICS)
