"""The report: its numbers over several runs, its page, and the counts that both rest on."""

import dataclasses
import json
import re

import numpy as np
import pytest

from shoal.driver.cli import main
from shoal.driver.jobs.accounts import Accounts, Usage, bucket
from shoal.driver.jobs.config import make_job
from shoal.driver.jobs.display import Display, format_s, progress
from shoal.driver.jobs.history import Samples
from shoal.driver.jobs.outcome import Status
from shoal.driver.jobs.report.figures import charts
from shoal.driver.jobs.report.numbers import gather, load_runs
from shoal.driver.jobs.report.write import make_report, write_report
from shoal.driver.jobs.state.folder import Folder
from shoal.driver.jobs.state.ledger import Ledger
from shoal.driver.jobs.status import StatusFile

ENGINE = {"tensor_parallel_size": 1, "device": "cpu", "dtype": "float32"}


class Life:
    """Writes the state of a job's runs as the job does, at made-up times."""

    def __init__(self, folder, monkeypatch):
        self.store, self.now, self.epoch = Folder(str(folder)), 1_000_000.0, 0
        monkeypatch.setattr("time.time", lambda: self.now)
        self.accounts = Accounts(total_rows=100)

    def run(self, status, *, rows, start_s=2.0, work_s=10, fresh=False, deaths=(), message=None, killed=False):
        """A run in which `rows` are answered, 20 tokens each, evenly over `work_s` seconds after `start_s`."""
        self.epoch += 1
        accounts, samples = self.accounts, Samples()
        accounts.engine_deaths = 0
        fields = {"input": "in.jsonl", "output": "out.jsonl", "engine": {"model": "m"}, "fresh": fresh}
        ledger = Ledger(self.store)
        assert ledger.epoch == self.epoch
        file = StatusFile(self.store, ledger, make_job(fields), accounts, samples, 1.0)
        file.enter(Status.VALIDATING)
        file.enter(Status.IN_PROGRESS)
        self.point(samples, 0)
        self.now += start_s
        samples.engines[0] = ENGINE
        samples.event("engine_up", "replica 0 is up")
        for second in range(work_s):
            if second in deaths:
                accounts.engine_deaths += 1
                samples.event("engine_death", "replica 0 died </script><b>")
            self.now += 1.0
            for _ in range(rows * (second + 1) // work_s - rows * second // work_s):
                accounts.answered(Usage(50, 20, 10), "length")
            accounts.generated[f"run {self.epoch}"] = (
                accounts.generated.get(f"run {self.epoch}", 0) + 22 * rows // work_s
            )
            self.point(samples, 0 if second in deaths else 8)
        if killed:
            accounts.mark_durable()
            file.write()
        else:
            accounts.mark_durable()
            file.enter(status, message)
        ledger.close()

    def point(self, samples, slots):
        accounts = self.accounts
        samples.add(
            settled=accounts.settled, errors=accounts.errors, committed_tokens=accounts.committed_tokens,
            generated_tokens=accounts.generated_tokens, prompt_tokens=accounts.prompt_tokens,
            cached_tokens=accounts.cached_tokens, running=slots // 2, waiting=1, slots=slots, kv_cache_usage=0.25,
            preemptions=0, deaths=accounts.engine_deaths,
        )  # fmt: skip


@pytest.fixture
def life(tmp_path, monkeypatch):
    return Life(tmp_path / "out.jsonl.shoal", monkeypatch)


def test_numbers_are_of_all_runs(life):
    life.run(Status.CANCELLED, rows=40, killed=True)
    life.now += 36_000  # the machine was off
    life.run(Status.COMPLETED, rows=60, deaths=(3, 4))
    report = gather(life.store, load_runs(life.store))
    assert report["time"]["work_s"] == 24
    assert report["time"]["ended"] - report["time"]["began"] == 36_024
    assert report["time"]["stages_s"] == {"validate": 0, "start_engine": 4, "answer": 20, "publish": 0}
    assert report["mean_rates"]["rows_s"] == 5
    tokens = report["tokens"]
    assert tokens["committed"] == 2000
    assert tokens["generated"] == tokens["committed"] + tokens["wasted"] == 2200
    assert report["waste"] == {"tokens": 200, "share": 0.0909, "equals_s": 1.8, "without_engine_s": 1}
    assert report["batch"]["occupancy"] == 0.5
    assert report["batch"]["mean_running"] == 4
    assert report["all_runs"] == {"runs": 2, "deaths": 2, "boot_failures": 0, "quarantined": 0, "preemptions": 0}
    assert [run["killed"] for run in report["runs"]] == [True, False]
    assert report["lengths"]["output"]["histogram"] == [[20, 100]]
    assert report["lengths"]["prompt"]["mean"] == 50
    assert report["tail"] == {"rows_share": 0.1, "seconds": 1, "time_share": 0.05}
    assert [event["kind"] for event in report["events"]] == ["engine_up", "engine_up", "engine_death", "engine_death"]
    assert report["versions"]["shoal"]


def test_a_fresh_start_forgets_the_runs_before(life):
    life.run(Status.FAILED, rows=40, message="no such luck")
    life.accounts = Accounts(total_rows=100)
    life.run(Status.COMPLETED, rows=100, fresh=True)
    report = gather(life.store, load_runs(life.store))
    assert report["all_runs"]["runs"] == 1
    assert report["time"]["work_s"] == 12


def test_charts_have_what_happened(life):
    life.run(Status.CANCELLED, rows=40)
    life.run(Status.COMPLETED, rows=60, deaths=(3,))
    life.accounts.failed("invalid_prompt")
    runs = load_runs(life.store)
    report = gather(life.store, runs)
    report["error_codes"] = {"invalid_prompt": 1}
    drawn = {chart.title: chart.figure for chart in charts(report, runs)}
    assert set(drawn) == {
        "Throughput", "Batch size", "KV cache", "Progress and tail", "Prefix cache", "Prompt lengths",
        "Output lengths", "Errors by code", "How answers ended",
    }  # fmt: skip
    made = drawn["Throughput"]["data"][0]
    values = [value for value in made["y"] if value is not None]
    assert max(values) == 132
    assert made["y"].count(None) == 2, "runs are apart"
    assert max(made["x"]) == 24
    lines = drawn["Throughput"]["layout"]["shapes"]
    assert sorted(line["x0"] for line in lines) == [12, 17], "the second run, and the death in it"
    assert max(value for value in drawn["Progress and tail"]["data"][0]["y"] if value is not None) == 100


@pytest.mark.parametrize(("status", "message"), [(Status.FAILED, "engines <died>"), (Status.CANCELLED, None)])
def test_the_page_holds_all_it_needs(life, tmp_path, status, message):
    life.run(status, rows=40, deaths=(2,), message=message)
    report, page = make_report(life.store)
    assert report["status"] == status
    assert report["tail"] is None
    without_library = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=", without_library), "nothing comes from a network"
    assert "Plotly.react" in page
    assert "<b></td>" not in page
    assert page.count("</script>") == 2, "text cannot end the script"
    if message:
        assert "engines &lt;died&gt;" in page
    figures = page.split("const FIGURES = ", 1)[1].split(";\nfunction", 1)[0]
    assert len(json.loads(figures)) == page.count('class="plot"')


def test_a_job_that_never_answered_has_a_report(life):
    config = make_job({"input": "in.jsonl", "output": "out.jsonl", "engine": {"model": "m"}})
    StatusFile(life.store, Ledger(life.store), config, Accounts(), Samples(), 1.0).enter(
        Status.FAILED, "3 rows cannot be used"
    )
    report, page = make_report(life.store)
    assert report["mean_rates"]["rows_s"] == 0
    assert "3 rows cannot be used" in page


def test_the_command(life, tmp_path, capsys):
    life.run(Status.COMPLETED, rows=100)
    state = tmp_path / "out.jsonl.shoal"
    assert main(["report", str(tmp_path / "out.jsonl")]) == 0
    assert "100 of 100 rows answered, 0 errors, 2,200 tokens generated" in capsys.readouterr().out
    assert json.loads((state / "report.json").read_text())["status"] == "completed"
    elsewhere = tmp_path / "r.html"
    assert main(["report", str(state), "-o", str(elsewhere)]) == 0
    assert elsewhere.read_text() == (state / "report.html").read_text()
    capsys.readouterr()
    assert main(["report", str(state), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["committed"] == 2000
    assert main(["report", str(tmp_path / "other.jsonl")]) == 2
    assert "neither the output of a job nor its state folder" in capsys.readouterr().err


def test_write_report_into_the_state(life, tmp_path):
    life.run(Status.COMPLETED, rows=100)
    assert write_report(life.store) == "report.html"
    assert (tmp_path / "out.jsonl.shoal" / "report.html").stat().st_size > 1_000_000


# ---- counts and what is shown of them ---------------------------------------------------------------------------


def test_buckets_are_exact_and_then_fine():
    assert [bucket(n) for n in (0, 1, 63, 64, 65, 66, 1000, 1023, 1024)] == [0, 1, 63, 64, 64, 66, 992, 1008, 1024]
    assert all(0 <= n - bucket(n) <= n / 32 for n in range(1, 100_000))


def test_counts_go_on_where_an_earlier_run_stood():
    accounts = Accounts(total_rows=10)
    accounts.found(4, {17: "invalid_prompt", 35: "engine_killed"})
    shown = [accounts.settled]
    for location, is_error in ((2, False), (17, True), (4, False)):
        accounts.met(location, is_error)
        shown.append(accounts.settled)
    accounts.answered(Usage(1, 1, 0), "stop")
    shown.append(accounts.settled)
    assert shown == [6, 6, 6, 6, 7]
    assert accounts.error_codes == {"invalid_prompt": 1, "engine_killed": 1}
    assert accounts.resumed == 3
    accounts.forget_unmet()  # two answers and an error are of rows that the input has no more
    assert (accounts.ok, accounts.errors, accounts.error_codes) == (3, 1, {"invalid_prompt": 1})


@pytest.mark.parametrize("num_expected", [0, 2, 9])
def test_many_known_rows_count_like_each_of_them(num_expected):
    values = np.array([4, 17, 8, 35, 12, 51], np.int64)
    codes = {17: "invalid_prompt", 35: "engine_killed"}  # nothing is known of 51
    one, many = Accounts(), Accounts()
    for accounts in (one, many):
        accounts.found(num_expected, dict(codes))
    for value in values.tolist():
        one.met(value, bool(value & 1))
    many.met_many(values)
    assert many == dataclasses.replace(one, started=many.started)
    assert (many.resumed, many.ok, many.errors) == (6, max(3, num_expected), 3)


def test_the_eta_counts_tokens(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    accounts = Accounts(total_rows=1000)
    accounts.mark()
    assert accounts.eta_s() is None
    for _ in range(100):
        accounts.answered(Usage(10, 50, 0), "stop")
    accounts.generated["one"] = 6000
    accounts.in_flight_tokens = 1000
    now = 10.0
    accounts.mark()
    assert accounts.rates() == (10, 100, 600)
    assert accounts.eta_s() == pytest.approx((900 * 60 - 1000) / 600)
    accounts.begun_rows, accounts.begun_limit = 200, 200 * 40  # no row may have more than 40
    assert accounts.eta_s() == pytest.approx((900 * 40 - 1000) / 600)


class Busy:
    num_running, num_waiting, kv_cache_usage = 8, 3, 0.5


def test_what_a_person_reads(caplog):
    accounts = Accounts(total_rows=2000)
    for _ in range(500):
        accounts.answered(Usage(10, 50, 0), "stop")
    accounts.failed("invalid_prompt")
    accounts.engine_deaths = 1
    text = " | ".join(progress(accounts, [Busy(), Busy()], starting=False))
    assert text == (
        "501 of 2,000 rows (25.1%), 0.0 rows/s | in 0 tok/s, out 0 tok/s | running 16, waiting 6, KV 50% | errors 1"
        " | engine deaths 1"
    )
    assert "starting engines" in " | ".join(progress(accounts, [], starting=True))
    assert [format_s(s) for s in (5, 65, 3700, 90000)] == ["5s", "1m 5s", "1h 1m", "1d 1h"]
    caplog.set_level("INFO", "shoal")
    display = Display(accounts, every_s=1e-9)
    display.tick([Busy()], starting=False)
    assert "501 of 2,000 rows" in caplog.text


def test_a_terminal_keeps_two_lines(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    accounts = Accounts(total_rows=20)
    display = Display(accounts, every_s=1000.0)
    display._shown -= 10
    accounts.answered(Usage(10, 50, 0), "stop")
    display.tick([Busy()], starting=False)
    display.close()
    err = capsys.readouterr().err
    assert "1/20 rows" in err
    assert "running 8, waiting 3, KV 50%" in err
