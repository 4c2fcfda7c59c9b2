"""A model's files: the local folder when there is one, else the Hugging Face hub through its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shoal.workers.loading.files import (
    CONFIG_FILE,
    NOT_WEIGHTS,
    TIERS,
    formats_tried,
    match_tier,
    no_weights,
    read_index,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

# What the client needs: config, tokenizer, chat templates. Weight indices and a trainer's log are JSON too.
CONFIG_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
NOT_CONFIG = ("*.index.json", "trainer_state.json")
SUBFOLDERS = ("*/*",)

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Repository:
    """One hub repository at one revision, as the user named it."""

    model: str
    revision: str | None
    token: str | None
    cache_dir: str | None

    def fetch(self, allow: Sequence[str], ignore: Sequence[str] = SUBFOLDERS) -> Path:
        """Folder of the snapshot, with the files that match; from the cache alone when offline.

        Raises ValueError, in words for the user, when the hub does not give them.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        # `from None`: the hub's exceptions carry the request, and with it the token.
        try:
            return Path(
                snapshot_download(
                    self.model,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    allow_patterns=list(allow),
                    ignore_patterns=list(ignore),
                )
            )
        except HFValidationError:
            raise invalid_model(self.model, "it is no existing folder, and no name a hub repository can have") from None
        except GatedRepoError:
            raise ValueError(
                f"model {self.model!r} is gated: ask for access at {self._page()}, then pass hf_token= "
                f"(or set HF_TOKEN) of an account that has it ({self._token_said()})"
            ) from None
        except RevisionNotFoundError:
            raise ValueError(
                f"revision {self.revision!r} was not found in model {self.model!r}: "
                f"give a branch, tag or commit that {self._page()} lists"
            ) from None
        except RepositoryNotFoundError:
            raise self._not_found() from None
        except LocalEntryNotFoundError as error:
            raise self._not_cached(self._clean(error)) from None
        except (HfHubHTTPError, OSError) as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 401:
                raise self._not_found() from None
            raise ValueError(f"cannot download model {self.model!r}: {self._clean(error)}") from None

    def _not_cached(self, reason: str) -> ValueError:
        from huggingface_hub import constants

        where = self.cache_dir or constants.HF_HUB_CACHE
        wanted = f"model {self.model!r} (revision {self.revision or 'main'!r})"
        if is_offline():
            return ValueError(
                f"{wanted} is not fully in the cache {where}, no local folder has that name, and HF_HUB_OFFLINE "
                "is set. Unset it once to download, copy the cache from a machine that has the model (HF_HOME or "
                "download_dir), or give a local folder."
            )
        return ValueError(
            f"{wanted} is not fully in the cache {where}, and the hub at {constants.ENDPOINT} does not answer: "
            f"{reason}. Check the network, HF_ENDPOINT and proxies, or give a local folder."
        )

    def _not_found(self) -> ValueError:
        # The hub answers the same for what is not there and what may not be seen.
        return invalid_model(self.model, f"the hub has no such repository, or it is private and {self._token_said()}")

    def _page(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.model}"

    def _token_said(self) -> str:
        from huggingface_hub import get_token

        return "the token given has no access" if self.token or get_token() else "no token was given"

    def _clean(self, error: BaseException) -> str:
        """First line of a message, with no token in it."""
        from huggingface_hub import get_token

        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        for secret in (self.token, get_token()):
            if secret:
                text = text.replace(secret, "***")
        return text


def ensure_files(
    model: str,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    kind: Literal["config", "weights"] = "config",
    *,
    load_format: str = "auto",
    code: bool = False,
) -> Path:
    """The local path of `model`: itself when it exists, else the snapshot folder of a hub repository.

    kind "config" fetches config, tokenizer and chat-template files (with `code` also *.py); "weights" fetches one
    checkpoint: safetensors if the repository has any, else PyTorch files, as `load_format` allows.
    Raises ValueError (no such repository or revision, gated, offline and not cached, network) or RuntimeError (no
    weights).
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1 or model.lower().endswith(".gguf"):
        raise invalid_model(model, "there is no such folder or file")
    repository = Repository(model, revision, token, download_dir)
    if kind == "config":
        patterns = (*CONFIG_PATTERNS, "*.py") if code else CONFIG_PATTERNS
        return repository.fetch(patterns, (*SUBFOLDERS, *NOT_CONFIG))
    return _fetch_weights(repository, load_format)


def is_commit(folder: Path) -> str | None:
    """The commit of a hub snapshot folder; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


def hub_token() -> str | None:
    """The token of this process's user, which processes on other nodes need not have: HF_TOKEN, or a file's."""
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def is_offline() -> bool:
    """Whether huggingface_hub was told not to use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def invalid_model(model: str, reason: str) -> ValueError:
    """The error for a model that is neither a folder nor a hub repository."""
    return ValueError(
        f"Invalid repository ID or local directory specified: '{model}': {reason}.\n"
        f"`model` must be a folder that holds {CONFIG_FILE} and the weights, one .gguf file, or a hub id "
        "such as 'organisation/name'."
    )


def _fetch_weights(repository: Repository, load_format: str) -> Path:
    """Asks for one tier of file names after another, so that a second format is never downloaded."""
    for form in formats_tried(load_format):
        for tier in TIERS.get(form, ()):
            # config.json is there to match something: the hub's client warns when nothing does.
            folder = repository.fetch((*tier, CONFIG_FILE), (*SUBFOLDERS, *NOT_WEIGHTS))
            found = match_tier([entry.name for entry in folder.iterdir()], tier)
            if found and found[0].endswith(".index.json"):
                return repository.fetch(sorted(set(read_index(folder / found[0]).values())))
            if found:
                return folder
    if is_offline():
        raise repository._not_cached("offline")
    raise no_weights(repository.model, load_format)
