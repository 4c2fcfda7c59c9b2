"""A job's own files: its input does not read them where they lie beside it, and its output takes no input's place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shoal.driver.jobs.config import JobConfig
from shoal.driver.jobs.files import InputFile, find_inputs
from shoal.driver.jobs.forms.plain import ID_COLUMNS
from shoal.driver.jobs.identity import JOB_FILE
from shoal.driver.jobs.publish import OutputPlan, plan_output
from shoal.driver.jobs.state.store import NO_ROOM

_PART = re.compile(r"part-\d{5,}\.(jsonl|parquet)")  # of either format: an `auto` one may follow from the input


def job_inputs(config: JobConfig) -> list[InputFile]:
    """The input files of a job, in order, without what an earlier run of it has written among them."""
    plan = plan_output(config, "jsonl", separate_errors=True)
    earlier = _earlier_form(plan)
    if earlier is None:  # nothing here is the job's: a file at the place of its output is an input like the others
        files = find_inputs(config.input, config.input_format)
    else:
        separate = config.error_output is not None or earlier == "openai"
        own = _OwnFiles(plan if separate else replace(plan, error_path=None))
        files = find_inputs(
            config.input, config.input_format, lambda filesystem, path: own.role(filesystem, path) is not None
        )
    optional = _optional_columns(config)
    return [replace(file, optional=optional) for file in files]


def refuse_inputs(config: JobConfig, plan: OutputPlan, files: Sequence[InputFile]) -> None:
    """ValueError where the output would take the place of an input file."""
    own = _OwnFiles(plan)
    for file in files:
        role = own.role(file.filesystem, file.path)
        if role is not None:
            raise ValueError(
                f"input {file.path!r} is also {role} of this job (output {config.output!r}): choose another output. "
                "A folder, or a glob in quotes, leaves out what an earlier run of the job wrote"
            )


def make_folders(plan: OutputPlan) -> None:
    """The folders that the output needs, made before anything is computed. ValueError where they cannot be."""
    if not plan.local:
        return
    outputs = [plan.path] if plan.error_path is None or plan.is_folder else [plan.path, plan.error_path]
    for path in outputs:
        folder = path if plan.is_folder else os.path.dirname(path) or "."
        _make_folder(path, folder)
    _make_folder(plan.path, plan.state_path)


def _make_folder(output: str, folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"output {output!r} cannot be created: a file is where it needs the folder {folder!r}"
        ) from None
    except OSError as error:
        if error.errno in NO_ROOM:  # it passes, and is no mistake of the user
            raise
        raise ValueError(f"output {output!r} cannot be created: no folder {folder!r}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output {output!r} cannot be created: the folder {folder!r} cannot be written to")


class _OwnFiles:
    """The places that a job writes to."""

    def __init__(self, plan: OutputPlan) -> None:
        self._plan = plan
        self._output, self._state = self._real(plan.path), self._real(plan.state_path)
        self._errors = None if plan.error_path is None else self._real(plan.error_path)

    def role(self, filesystem: Any, path: str) -> str | None:
        """What a file of some filesystem is to the job; None: nothing."""
        if not _same_store(filesystem, self._plan.filesystem):
            return None
        path = self._real(path)
        if _is_in(path, self._state):
            return "in the state"
        if self._errors is not None and (_is_in(path, self._errors) if self._plan.is_folder else path == self._errors):
            return "the error output"
        if self._plan.is_folder:
            folder, _, name = path.rpartition("/")
            return "a part of the output" if folder == self._output and _PART.fullmatch(name) else None
        return "the output" if path == self._output else None

    def _real(self, path: str) -> str:
        """The one name of a file that may have several."""
        return os.path.realpath(path) if self._plan.local else path.rstrip("/")


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _same_store(one: Any, other: Any) -> bool:
    """Of fsspec's filesystems; two that wrap the same one of pyarrow are not the same to fsspec."""
    return bool(one == other or (type(one) is type(other) and getattr(one, "fs", one) == getattr(other, "fs", other)))


def _earlier_form(plan: OutputPlan) -> str | None:
    """The form of rows that an earlier run of this output has read; None where there was no such run."""
    path = f"{plan.state_path}/{JOB_FILE}"
    if not plan.filesystem.exists(path):
        return None
    form: str = json.loads(plan.filesystem.cat_file(path))["identity"]["parameters"]["form"]
    return form


def _optional_columns(config: JobConfig) -> tuple[tuple[str, str], ...]:
    """For InputFile.optional: what a row may leave out."""
    ids = ID_COLUMNS if config.id_column is None else (config.id_column,)
    names = [(name, name) for name in (config.sampling_column, *ids)]
    if config.prompt_template is None:  # else these two are columns like all others
        names += [(config.messages_column, config.messages_column), (config.prompt_column, config.messages_column)]
    return tuple(names)
