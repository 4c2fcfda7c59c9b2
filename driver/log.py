"""The package's logger: one line on stderr where the program has set up no logging of its own."""

from __future__ import annotations

import logging
import os

from shoal.driver.secrecy import MaskSecrets

LOGGER = logging.getLogger("shoal")
LOGGER.addFilter(MaskSecrets())


def set_up_logging() -> None:
    """Show messages from SHOAL_LOG_LEVEL (default INFO) up, unless the program decides about logging itself."""
    if LOGGER.handlers or logging.getLogger().handlers or LOGGER.level != logging.NOTSET:
        return
    level = os.environ.get("SHOAL_LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ValueError(f"SHOAL_LOG_LEVEL must be one of {sorted(logging.getLevelNamesMapping())}, got {level!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("shoal %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    LOGGER.propagate = False
