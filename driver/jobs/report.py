"""report.json: what a job did, in numbers."""

from __future__ import annotations

import json
from typing import Any

from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.state.store import StateStore
from shoal.driver.secrecy import masked

REPORT_FILE = "report.json"


def write_report(store: StateStore, config: JobConfig, status: dict[str, Any]) -> None:
    """Writes report.json beside the state."""
    report = {
        **status,
        "model": config.engine.model,
        "input": config.input,
        "output": config.output,
        "job": config.model_dump(mode="json", exclude={"engine"}),
    }
    store.put(REPORT_FILE, masked(json.dumps(report, indent=1, default=str)).encode())
