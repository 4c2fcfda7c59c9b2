"""Asks every running job of this cluster to stop, and waits until they have: what a head runs before it goes.

A job that is asked finishes the rows it has begun, as far as RAY_JOB_STOP_WAIT_TIME_S lets it; submitted again, it
resumes. Without this, a head that is ended takes its jobs' unfinished rows with it: none is lost, but they are computed
again.
"""

from __future__ import annotations

import os
import sys
import time

from ray.job_submission import JobSubmissionClient


def main() -> int:
    """0 when no job is left, 1 when some still ran after the time they get and ten seconds."""
    client = JobSubmissionClient(os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"))
    left = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    for name in left:
        client.stop_job(name)
    deadline = time.monotonic() + float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) + 10
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        left = [name for name in left if not client.get_job_status(name).is_terminal()]
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
