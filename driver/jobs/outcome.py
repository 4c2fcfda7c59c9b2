"""How a job ends: its states and the exit codes of `shoal run-batch`."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Status(StrEnum):
    """Where a job stands; the names are those of OpenAI's batches."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class Exit(IntEnum):
    """Exit codes. 2 is argparse's own for wrong arguments; 1 is Python's for what nobody foresaw."""

    COMPLETED = 0
    """Every row is in the output, with an answer or its error."""
    UNEXPECTED = 1
    USAGE = 2
    """A wrong argument, input that cannot be read, a model that cannot be used."""
    INVALID_INPUT = 3
    """Validation found rows that cannot be used, and on_invalid is stop."""
    FAILED = 4
    """Engines kept dying, could not be placed, or too many rows ended in an error; the same command resumes."""
    CHANGED = 5
    """Input, model or parameters are not those of the earlier run of this output."""
    SUPERSEDED = 6
    """A newer run of the same output has taken the job over."""
    INTERRUPTED = 130
    """Ctrl-C; the same command resumes."""
    TERMINATED = 143
    """SIGTERM; the same command resumes."""


class JobError(Exception):
    """A job that ends without completing, and why."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


def brief_error(error: BaseException) -> str:
    """An error in one line: a rank's whole traceback is in the log already."""
    return f"{type(error).__name__}: {brief(str(error))}"


def brief(text: str) -> str:
    """The first line and the last, at most 500 characters."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (f"{lines[0]} ... {lines[-1].strip()}" if len(lines) > 1 else (lines[0] if lines else ""))[:500]
