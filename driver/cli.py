"""The command `shoal`. A subcommand is a module and one row in COMMANDS; only the one that is asked for is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from shoal.driver.secrecy import masked

# Name, what it does, and the module with its `add_arguments(parser)` and `run(args) -> exit status`.
# `args.own_process`: the process is there for nothing else.
COMMANDS = {
    "bench": ("measure the engine on made-up work", "shoal.driver.bench.command"),
    "plan": ("say what a batch job would do, without an engine", "shoal.driver.jobs.plan.command"),
    "report": ("draw what a batch job did", "shoal.driver.jobs.commands.report"),
    "run-batch": ("answer the rows of files, each exactly once", "shoal.driver.jobs.commands.run_batch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `shoal ARGV`. A user's mistake (ValueError) is one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    args = _parser(chosen).parse_args(arguments)
    _, module = COMMANDS[args.command]
    args.own_process = argv is None
    try:
        return int(import_module(module).run(args))
    except ValueError as error:
        print(masked(f"shoal {args.command}: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as a shell says it of a command that Ctrl-C ended


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """All subcommands by name; the chosen one with its arguments."""
    parser = argparse.ArgumentParser(prog="shoal", description="Offline LLM inference on Ray.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, module) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == chosen:
            import_module(module).add_arguments(command)
    return parser


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import shoal

        print(f"shoal {shoal.__version__}")
        parser.exit()
