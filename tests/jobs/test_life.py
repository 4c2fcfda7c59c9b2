"""A job's life: what its status says, whenever it is asked, stopped, killed, or out of room."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from shoal.driver.jobs.outcome import Exit

ROWS = [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(60)]


@pytest.mark.contract
def test_a_stop_while_validating(run, write_rows, monkeypatch):
    """Clause 11: reading a long input is no reason to make whoever stops the job wait."""
    from shoal.driver.jobs import scan

    real, pid = scan.Scanner.scan, os.getpid()

    def slow(self, chunk):
        os.kill(pid, signal.SIGTERM)
        return real(self, chunk)

    monkeypatch.setattr(scan.Scanner, "scan", slow)
    ran = run(write_rows([*ROWS, "no json"]))
    assert ran.code == Exit.TERMINATED
    assert list(ran.status()["times"]) == ["validating", "cancelled"]
    monkeypatch.undo()


@pytest.mark.contract
def test_a_stop_while_the_output_is_written(run, write_rows, monkeypatch):
    """Clause 11: an output that is not whole never appears; the next run writes it without computing anything."""
    from shoal.driver.jobs import job

    real = job.Job._publish

    def stopped(self):
        self._stop.ask(Exit.TERMINATED, 0.0)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "_publish", stopped)
        ran = run(write_rows(ROWS))
    assert ran.code == Exit.TERMINATED
    assert list(ran.status()["times"]) == ["validating", "in_progress", "finalizing", "cancelled"]
    assert not Path(ran.output).exists()
    again = run(write_rows(ROWS))
    assert again.code == Exit.COMPLETED
    assert again.report()["rows"]["resumed"] == len(again.rows()) == 60


def test_what_nobody_foresaw_is_no_live_job(run, write_rows, monkeypatch, load_job, tmp_path):
    from shoal.driver.jobs import runner

    def broken(self, event):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(runner.Runner, "_on_chunk", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(write_rows(ROWS))
    status = load_job(tmp_path / "out.jsonl").status()
    assert (status["status"], status["message"]) == ("failed", "RuntimeError: a mistake of ours")


@pytest.mark.contract
@pytest.mark.parametrize("when", ["work", "start"])
def test_a_disk_without_room_for_anything(run, write_rows, monkeypatch, load_job, tmp_path, when):
    """Clause 12: no file of the state can be written for a while. Work waits for room; a job that cannot even begin
    says so, and what is there stays whole."""
    from shoal.driver.jobs.state import folder

    real_write, real_whole, full = os.write, folder.write_whole, threading.Event()

    def write(handle, data):
        if full.is_set() and bytes(data[8:9]) == b" ":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(handle, data)

    def whole(path, data):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        real_whole(path, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(folder, "write_whole", whole)
    if when == "start":
        full.set()
        ran = run(write_rows(ROWS))
        assert ran.code == Exit.FAILED
        full.clear()
    else:
        watched = load_job(tmp_path / "out.jsonl")

        def fill():
            watched.wait_for(8)
            full.set()
            time.sleep(2.5)
            full.clear()

        thread = threading.Thread(target=fill)
        thread.start()
        monkeypatch.setenv("SHOAL_STUB_STEP_S", "0.03")
        ran = run(write_rows(ROWS), commit_rows=4)
        thread.join()
        assert ran.code == Exit.COMPLETED
    again = run(write_rows(ROWS))
    assert again.code == Exit.COMPLETED
    assert [row["id"] for row in again.rows()] == [row["id"] for row in ROWS]
    done = [meta["id"] for meta in again.records("ok")]
    assert len(done) == len(set(done)) == 60
