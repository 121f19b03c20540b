"""The command line. It answers `--help` and refuses bad flags before torch is imported (seconds otherwise)."""

import difflib
import os
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import tyro

from simclr import UserError, __version__
from simclr.commands import COMMANDS


def main() -> None:
    """Entry point of `simclr`: a user's mistake ends in one sentence and exit code 2."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if arguments[0] == "--version":
        print(f"simclr {__version__}")
        return
    try:
        _run(arguments[0], arguments[1:])
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"simclr: {'' if rank == '0' else f'[process {rank}] '}{error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("simclr: stopped.", file=sys.stderr)
        sys.exit(130)


def _run(name: str, arguments: list[str]) -> None:
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Perhaps you meant `simclr {near[0]}`." if near else ""
        raise UserError(f"There is no command {name!r}; there are {', '.join(COMMANDS)}.{hint}")
    prog = f"simclr {name}"
    parsed = tyro.cli(command.flags, prog=prog, args=arguments)

    module, function = command.job.split(":")
    job = getattr(import_module(module), function)  # imports torch: only now that the arguments are known to be good
    field = command.settings
    if field is None:
        job(parsed)
        return

    def over(settings: Any) -> Any:
        """These settings, with the flags that were given on top."""
        default = replace(parsed, **{field: settings})
        return getattr(tyro.cli(command.flags, prog=prog, args=arguments, default=default), field)

    job(parsed, over)


def _overview() -> str:
    lines = ["simclr: contrastive pretraining from a folder of images (SimCLR, arXiv:2002.05709).", ""]
    for name, command in COMMANDS.items():
        summary = (command.flags.__doc__ or "").split("\n")[0]
        lines.append(f"  simclr {name:<9} {summary}")
    return "\n".join([*lines, "", "`simclr COMMAND --help` tells more."])
