"""Starts stub jobs by forking, so that their imports, which take seconds, are done once: python job_forge.py

Reads a line of JSON for each request and answers with one: {"start": [arguments, environment, log]} gives the job's
pid, {"poll": pid} its return code as subprocess has it, null while it runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from shoal.driver.torch_free import keep_torch_out

keep_torch_out()  # as the command itself does

import ray.data  # noqa: E402, F401
import stub_ranks  # noqa: E402
import transformers.tokenization_utils_tokenizers  # noqa: E402, F401

import shoal.driver.jobs.commands.run_batch  # noqa: E402
import shoal.driver.jobs.job  # noqa: E402, F401
from shoal.driver.cli import main  # noqa: E402


def become(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """This process is the job from here on."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["shoal", *arguments]
    stub_ranks.install()


def serve() -> int:
    """The exit code, of the forge or of a job."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if not answer:
                become(*request["start"])
                return main()
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
