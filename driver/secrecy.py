"""What must not be seen: settings that hold secrets, and texts with the secrets in them taken out."""

from __future__ import annotations

import logging
import os
import re

_SECRET_NAME = re.compile(r"(?:^|_)(?:token|secret|password|credentials?|api_key|access_key)$", re.IGNORECASE)
_NO_SECRETS = {"HF_HUB_DISABLE_IMPLICIT_TOKEN"}  # a switch
_TOKEN_SETTINGS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN")
GIVE_TOKEN = "set HF_TOKEN, or HF_TOKEN_PATH to a file that holds it, where the job runs"
_SHORTEST = 8  # a shorter setting is no token, and taking it out would spoil texts
_HIDDEN = "***"
_PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), _HIDDEN),
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), f"{_HIDDEN}@"),  # user:password@ of an address
    (
        re.compile(
            r"([?&](?:[a-z_-]*token|sig|x-(?:amz|goog)-(?:signature|credential)|signature|api_?key|awsaccesskeyid)=)"
            r"[^&\s'\",)]+",
            re.IGNORECASE,
        ),
        rf"\1{_HIDDEN}",
    ),
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name (hf_token, HF_TOKEN, ...) holds a secret. HF_TOKEN_PATH, say, does not."""
    return name not in _NO_SECRETS and _SECRET_NAME.search(name) is not None


def masked(text: str) -> str:
    """`text` with *** for what opens doors: tokens of this environment, hub tokens, passwords in URLs."""
    for name in _TOKEN_SETTINGS:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, _HIDDEN)
    for pattern, hidden in _PATTERNS:
        text = pattern.sub(hidden, text)
    return text


class MaskSecrets(logging.Filter):
    """Masks what is logged, whoever's handlers it goes to."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True: the record goes on, masked."""
        record.msg, record.args = masked(record.getMessage()), None
        return True
