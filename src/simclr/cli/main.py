"""The command line. It answers `--help` and refuses bad flags before torch is imported (seconds otherwise)."""

import difflib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields
from importlib import import_module
from typing import Any

import tyro

from simclr import UserError, __version__
from simclr.cli.commands import COMMANDS
from simclr.config.deprecated import rename_flags
from simclr.config.overrides import Overrides
from simclr.errors import ReportedElsewhere, Stopped
from simclr.files import reason_of


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
        with _sentences():
            _run(arguments[0], arguments[1:])
    except UserError as error:
        if _reports(error):
            rank = os.environ.get("RANK", "0")
            print(f"simclr: {'' if rank == '0' else f'[process {rank}] '}{error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        if not _is_one_of_several():  # tell the shell, so that `&&` stops too; torchrun reports on its processes itself
            sys.exit(128 + stop.signal)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        if _reports(UserError("stopped")):
            print("simclr: stopped.", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn errors of the operating system, of memory and of recursion into a sentence instead of a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"The operating system reported an error: {reason_of(error)}{where}; check the paths, their permissions "
            "and the space on the disk, then try again."
        ) from error
    except MemoryError:
        raise UserError(
            "Out of memory; end other programs, or use fewer or smaller images, or a smaller batch."
        ) from None
    except RecursionError:
        raise UserError("Something that was read is nested too deeply; check the files that were given.") from None


def _reports(error: UserError) -> bool:
    """Whether this process prints the error: of torchrun's processes the first one that failed."""
    if isinstance(error, ReportedElsewhere):
        return False
    if not _is_one_of_several():
        return True
    from simclr.distributed import is_first_to_fail

    return is_first_to_fail(str(error))


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _parse(flags: type, prog: str, arguments: list[str]) -> Any:
    """The flags; of several processes one alone prints what is wrong with them."""
    if not _is_one_of_several():
        return tyro.cli(flags, prog=prog, args=arguments)
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(flags, prog=prog, args=arguments)
    except SystemExit as stop:
        if stop.code and _reports(UserError("bad flags")):
            sys.stderr.write(printed.getvalue())
        raise


def _warn(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr)


def _run(name: str, arguments: list[str]) -> None:
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Perhaps you meant `simclr {near[0]}`." if near else ""
        raise UserError(f"There is no command {name!r}; there are {', '.join(COMMANDS)}.{hint}")
    prog = f"simclr {name}"
    arguments = rename_flags(arguments, _warn)
    parsed = _parse(command.flags, prog, arguments)

    _let_waiting_threads_sleep()
    module, function = command.job.split(":")
    job = getattr(import_module(module), function)  # imports torch: only now that the arguments are known to be good
    if command.settings is None:
        job(parsed)
    else:
        job(parsed, Overrides(_given(getattr(parsed, command.settings), command.settings, arguments)))


def _let_waiting_threads_sleep() -> None:
    """Where the environment does not say how OpenMP's threads wait: asleep, after microseconds instead of milliseconds.

    On a quiet machine that is as fast. Beside other programs, threads that spin use up their share of the cores, and
    the next operation waits for one of them. GNU's OpenMP, torch's on Linux, reads this when torch is loaded.
    """
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _given(config: Any, field: str, arguments: list[str]) -> dict[str, Any]:
    """The settings that flags name, with their values.

    Args:
        config: The parsed settings.
        field: "config", whose flags have no prefix, or the prefix of the settings' flags.
    """
    prefix = "" if field == "config" else f"{field}."
    flags = [argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")]
    names = [flag.removeprefix(prefix).replace("-", "_") for flag in flags if flag.startswith(prefix)]
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name in names or f"no_{f.name}" in names}


def _overview() -> str:
    lines = ["simclr: contrastive pretraining from a folder of images (SimCLR, arXiv:2002.05709).", ""]
    for name, command in COMMANDS.items():
        summary = (command.flags.__doc__ or "").split("\n")[0]
        lines.append(f"  simclr {name:<9} {summary}")
    return "\n".join([*lines, "", "`simclr COMMAND --help` describes a command and its flags."])
