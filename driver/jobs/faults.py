"""What is wrong with one row: a code to count by, the stage that saw it, and a message for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass

# Codes that validation finds by reading alone; each is a row error where the job is told to continue.
READ_CODES = ("blank_line", "invalid_json", "invalid_utf8", "invalid_csv", "line_too_long", "not_an_object")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row has no answer. `stage`: read, validate, template, parameters, tokenize or engine."""

    code: str
    stage: str
    message: str

    def as_dict(self) -> dict[str, str]:
        """For the error column."""
        return asdict(self)


class RowError(ValueError):
    """Raised while a row is turned into a request; it becomes that row's error and nothing else."""

    def __init__(self, code: str, stage: str, message: str) -> None:
        super().__init__(message)
        self.fault = Fault(code, stage, message)
