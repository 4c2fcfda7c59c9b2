"""Writes report.json and report.html, at the end of a job or whenever someone asks."""

from __future__ import annotations

import json
import os
from typing import Any

from shoal.driver.jobs.files import STATE_SUFFIX, filesystem_of
from shoal.driver.jobs.publish import FOLDER_STATE
from shoal.driver.jobs.report.numbers import gather, load_runs
from shoal.driver.jobs.report.page import make_page
from shoal.driver.jobs.state.folder import Folder
from shoal.driver.jobs.state.objects import Objects
from shoal.driver.jobs.state.store import StateStore
from shoal.driver.jobs.status import STATUS_FILE

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
_LOCAL = ("file", "local")


def write_report(store: StateStore) -> str:
    """Both files, into the state folder; the page's name there."""
    report, page = make_report(store)
    store.put(REPORT_FILE, json.dumps(report, indent=1).encode())
    store.put(PAGE_FILE, page.encode())
    return PAGE_FILE


def make_report(store: StateStore) -> tuple[dict[str, Any], str]:
    """Their contents. ValueError where no job has left its history."""
    runs = load_runs(store)
    report = gather(store, runs)
    return report, make_page(report, runs)


def find_state(address: str) -> tuple[StateStore, str]:
    """The state that an output, or the state folder itself, names, for reading; and where it is. ValueError: none."""
    filesystem, path = filesystem_of(address)
    path = path.rstrip("/")
    names = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    for candidate in (path, path + STATE_SUFFIX, f"{path}/{FOLDER_STATE}"):
        if filesystem.exists(f"{candidate}/{STATUS_FILE}"):
            if any(name in _LOCAL for name in names):
                return Folder(os.path.abspath(candidate)), candidate
            return Objects(filesystem, candidate, 1, 1.0), candidate
    raise ValueError(f"{address!r} is neither the output of a job nor its state folder: no {STATUS_FILE} found")
