"""A job's metrics for Prometheus."""

from __future__ import annotations

import time

from shoal.driver.jobs.accounts import Accounts
from shoal.driver.telemetry import Publisher

EVERY_S = 2.0


class JobTelemetry:
    """Publishes a job's accounts now and then. Its process must have joined a cluster."""

    def __init__(self, job: str, model: str, accounts: Accounts) -> None:
        """`job`: a name that tells this job from others."""
        self._accounts = accounts
        self._publisher = Publisher({"job": job, "model": model})
        self._published = 0.0

    def tick(self, num_engines: int, now: bool = False) -> None:
        """Publishes if it is time to, or `now`."""
        if not now and time.monotonic() - self._published < EVERY_S:
            return
        self._published = time.monotonic()
        accounts, publisher = self._accounts, self._publisher
        rows = {"answered": accounts.ok, "failed": accounts.errors, "resumed": accounts.resumed}
        if accounts.total_rows is not None:
            rows["total"] = accounts.total_rows
        for state, count in rows.items():
            publisher.gauge("shoal_job_rows", count, state=state)
        for code, count in accounts.error_codes.items():
            publisher.gauge("shoal_job_errors", count, code=code)
        publisher.gauge("shoal_job_committed_tokens", accounts.committed_tokens)
        publisher.gauge("shoal_job_wasted_tokens", accounts.wasted_tokens)
        publisher.gauge("shoal_job_generated_tokens", accounts.generated_tokens)
        publisher.gauge("shoal_job_prompt_tokens", accounts.prompt_tokens)
        publisher.gauge("shoal_job_cached_tokens", accounts.cached_tokens)
        publisher.total("shoal_job_engine_deaths", accounts.engine_deaths)
        publisher.total("shoal_job_quarantined_rows", accounts.quarantined)
        publisher.gauge("shoal_job_engines", num_engines)
        eta = accounts.eta_s()
        if eta is not None:
            publisher.gauge("shoal_job_eta_seconds", eta)
