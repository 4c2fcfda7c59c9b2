"""Engine arguments as command-line flags: one for each field of EngineConfig, made from the class itself."""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Container
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from shoal.driver.config import EngineConfig
from shoal.driver.secrecy import GIVE_TOKEN

_DEST = "engine."  # keeps a flag's place apart from the command's own arguments of the same name


def add_engine_options(parser: argparse.ArgumentParser, hidden: Container[str] = ()) -> None:
    """A flag for every field but `model` (that for `hf_token` refuses): `--max-num-seqs 512`, `--enforce-eager`,
    `--no-enable-prefix-caching`, JSON for dicts, "module:Class" (one or more) for lists.

    `hidden`: fields that the command's own config refuses in better words than "unrecognized"; its help has them not.
    """
    group = parser.add_argument_group("engine options", "as in LLM(...); what is not given keeps its default there")
    add_field_options(group, EngineConfig, {"model", "hf_token"}, _DEST, hidden)
    group.add_argument("--hf-token", nargs="?", action=_NoSecret, help=f"refused: {GIVE_TOKEN}")


def add_field_options(
    group: Any, config: type[BaseModel], skip: Container[str], prefix: str, hidden: Container[str] = ()
) -> None:
    """A flag for every field of a config but those of `skip`; it is in the namespace only where it was given."""
    for name, field in config.model_fields.items():
        if name not in skip:
            flag = "--" + name.replace("_", "-")
            text = argparse.SUPPRESS if name in hidden else (field.description or "").replace("%", "%%")
            dest = prefix + name
            group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, help=text, **_form(field.annotation, name))


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, as keyword arguments of LLM; EngineConfig checks and converts the values."""
    return {name.removeprefix(_DEST): value for name, value in vars(args).items() if name.startswith(_DEST)}


def _form(annotation: Any, name: str) -> dict[str, Any]:
    """How argparse takes a field of this type."""
    options = [a for a in get_args(annotation) if a is not type(None)] if _is_union(annotation) else [annotation]
    origins = [get_origin(option) or option for option in options]
    if bool in options:
        return {"action": argparse.BooleanOptionalAction}
    if Literal in origins and int not in options:
        choices = [choice for option in options for choice in get_args(option)]
        return {"choices": choices, "type": type(choices[0])}
    if dict in origins:
        return {"type": json_object, "metavar": "JSON"}
    if list in origins:
        return {"nargs": "+", "metavar": "NAME"}
    return {"metavar": "N" if int in options else "X" if float in options else name.upper()}


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def json_object(text: str) -> dict[str, Any]:
    """The type of an argument that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


class _NoSecret(argparse.Action):
    """A flag that there is only to be refused: `ps`, shells' histories and Ray's dashboard show what it is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Ends the command without repeating the value."""
        flag = self.option_strings[0]
        parser.error(f"{flag}: a command line is seen by others; {GIVE_TOKEN}")
