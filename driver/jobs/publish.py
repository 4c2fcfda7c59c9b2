"""From the ledger to the output: files that appear whole, and can be made again from the ledger at any time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from shoal.driver.jobs.config import JobConfig, suffix
from shoal.driver.jobs.files import STATE_SUFFIX, filesystem_of
from shoal.driver.jobs.keys import Int64, Numbers
from shoal.driver.jobs.sinks.registry import Sink, make_sink
from shoal.driver.jobs.state.folder import sync_folder
from shoal.driver.jobs.state.ledger import Ledger

FOLDER_STATE = "_shoal"
_LOCAL = ("file", "local")


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """Where everything of a job goes. Paths are inside `filesystem`."""

    filesystem: Any
    local: bool
    format: str
    path: str  # of the file, or of the folder
    error_path: str | None  # of the file, or of the folder; None: rows in error are in the output itself
    state_path: str
    is_folder: bool

    def part(self, number: int) -> str:
        """A part of a folder."""
        return f"{self.path}/part-{number:05d}.{self.format}"

    def error_part(self, number: int) -> str | None:
        """The rows in error of that part."""
        return None if self.error_path is None else f"{self.error_path}/part-{number:05d}.{self.format}"


def plan_output(config: JobConfig, input_format: str, separate_errors: bool) -> OutputPlan:
    """Where the output goes. ValueError where it cannot go there."""
    filesystem, path = filesystem_of(config.output)
    path = path.rstrip("/")
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    local = any(name in _LOCAL for name in protocols)
    format_ = config.output_format
    if format_ == "auto":
        format_ = "parquet" if (suffix(config.output) or input_format) == "parquet" else "jsonl"
    separate = separate_errors or config.error_output is not None
    if config.is_folder:
        if config.error_output is not None:
            raise ValueError("error_output: a folder output has its rows in error in _errors/ or in its parts")
        errors = f"{path}/_errors" if separate else None
        return OutputPlan(filesystem, local, format_, path, errors, f"{path}/{FOLDER_STATE}", True)
    if local and os.path.isdir(path):
        raise ValueError(f"output {config.output!r} is a folder: end it in / to have parts written into it")
    base, ending = os.path.splitext(path)
    error_path = f"{base}.errors{ending}" if separate else None
    if config.error_output is not None:
        other, error_path = filesystem_of(config.error_output)
        if other.protocol != filesystem.protocol:
            raise ValueError(f"error_output must be on the store of output, got {config.error_output!r}")
        _check_error_output(config, error_path, path, local)
    return OutputPlan(filesystem, local, format_, path, error_path, path + STATE_SUFFIX, False)


def _check_error_output(config: JobConfig, error_path: str, path: str, local: bool) -> None:
    """Whether it can be beside the output at `path`. ValueError where it cannot."""
    given, state = config.error_output, path + STATE_SUFFIX
    if local:
        if str(given).endswith("/") or os.path.isdir(error_path):
            raise ValueError(f"error_output must name a file, got the folder {given!r}")
        error_path, path, state = map(os.path.realpath, (error_path, path, state))
    if error_path == path:
        raise ValueError(f"error_output must be another file than output, got {given!r} for both")
    if f"{error_path}/".startswith(f"{state}/"):
        raise ValueError(f"error_output must not be in the job's state folder {state!r}, got {given!r}")


class GaveUpError(RuntimeError):
    """A file was not finished; nothing of it is left, and it can be made again."""


class Publisher:
    """Makes output files out of a ledger's durable records. `where`: the location of each input row's record."""

    def __init__(self, plan: OutputPlan, ledger: Ledger, where: Numbers, order: str) -> None:
        self._plan, self._ledger, self._where, self._order = plan, ledger, where, order

        self.give_up: Callable[[], bool] = lambda: False

    def publish(self, num_rows: int) -> list[str]:
        """The whole output of `num_rows` input rows; the paths of its files. GaveUpError where it was to give up."""
        return self._publish(0, num_rows, self._plan.path, self._plan.error_path)

    def publish_part(self, number: int, start: int, stop: int) -> list[str]:
        """One part of a folder, with input rows start to stop."""
        return self._publish(start, stop, self._plan.part(number), self._plan.error_part(number))

    def made_of(self, start: int, stop: int) -> str:
        """A digest of which records rows start to stop are."""
        return self._ledger.fingerprint(self._where.slice(start, stop))

    def publish_partial(self, num_rows: int) -> list[str]:
        """What there is so far, beside the state."""
        path = f"{self._plan.state_path}/partial.{self._plan.format}"
        errors = None
        if self._plan.error_path is not None:
            errors = f"{self._plan.state_path}/partial.errors.{self._plan.format}"
        return self._publish(0, num_rows, path, errors)

    def _publish(self, start: int, stop: int, path: str, error_path: str | None) -> list[str]:
        with _Whole(self._plan, path) as good, _Whole(self._plan, error_path) as bad:
            for location in self._locations(start, stop):
                is_error, row = self._ledger.row(location)
                sink = bad if is_error and bad is not None else good
                assert sink is not None
                sink.write(row)
            self._ledger.check_owner()  # a newer run publishes for itself
            files = [one for one in (good, bad) if one is not None]
            for one in files:
                one.finish()
        return [one for one in (path, error_path) if one is not None]

    def _locations(self, start: int, stop: int) -> Iterator[int]:
        found: Int64 = self._where.slice(start, stop)
        found = found[found >= 0]
        if self._order == "completion":
            found = np.sort(found)
        for piece in range(0, len(found), 4096):
            if self.give_up():
                raise GaveUpError("stopped while the output was being written")
            yield from found[piece : piece + 4096].tolist()


class _Whole:
    """A file that takes the place of the old one only when everything was written; `None` as path: nothing."""

    def __init__(self, plan: OutputPlan, path: str | None) -> None:
        self._plan, self._path = plan, path
        self._finished = False
        self._partial = ""
        self._stream: IO[bytes]
        self._sink: Sink

    def __enter__(self) -> _Whole | None:
        if self._path is None:
            return None
        if self._plan.local:
            folder = os.path.dirname(self._path) or "."
            os.makedirs(folder, exist_ok=True)
            # The leading dot keeps it out of globs and of whoever reads the folder.
            self._partial = os.path.join(folder, f".{os.path.basename(self._path)}.{os.getpid()}.tmp")
            self._stream = open(self._partial, "wb")
        else:
            self._stream = tempfile.TemporaryFile()
        self._sink = make_sink(self._plan.format, self._stream)
        return self

    def write(self, row: bytes) -> None:
        """Adds a row."""
        self._sink.write(row)

    def finish(self) -> None:
        """Completes the content; it appears under its name when the `with` block ends without an error."""
        self._sink.finish()
        self._stream.flush()
        if self._plan.local:
            os.fsync(self._stream.fileno())
        self._finished = True

    def __exit__(self, *_: object) -> None:
        if self._path is None:
            return
        try:
            if self._finished:
                self._appear(self._path)
        finally:
            self._stream.close()
            if self._partial:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._partial)

    def _appear(self, path: str) -> None:
        if self._plan.local:
            os.replace(self._partial, path)
            sync_folder(os.path.dirname(path) or ".")
            return
        self._stream.seek(0)
        # An upload shows its object only once it is whole.
        with self._plan.filesystem.open(path, "wb") as target:
            while data := self._stream.read(8 << 20):
                target.write(data)
