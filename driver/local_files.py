"""Local files that a setting names instead of holding their text: templates. Read only under an allowed folder.

Nothing in a row of data names a file: rows come from elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

_MOST_BYTES = 4 << 20


def is_template_text(value: str) -> bool:
    """Whether `value` is a template itself, not the name of one."""
    return "{" in value or "\n" in value


def read_template(field: str, value: str, allowed_folder: str | None) -> str:
    """The template that `value` is, or that the file it names holds.

    Files under the working directory and under `allowed_folder` may be read, links followed. Raises ValueError, naming
    `field`, where `value` is neither text nor such a file.
    """
    if is_template_text(value):
        return value
    path = Path(os.path.realpath(os.path.expanduser(value)))
    if not path.is_file():
        raise ValueError(f"{field} {value!r} is neither Jinja text (no '{{' in it) nor a file")
    folders = [os.getcwd(), *([allowed_folder] if allowed_folder is not None else [])]
    if not any(path.is_relative_to(os.path.realpath(os.path.expanduser(folder))) for folder in folders):
        raise ValueError(
            f"{field} {value!r} is the file {path}, which lies outside of {' and '.join(folders)}: name its folder in "
            "allowed_local_path"
        )
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{field} {value!r} is a file of {size} bytes; a template has at most {_MOST_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{field} {value!r} cannot be read: {error}") from None
