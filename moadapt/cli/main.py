"""The `moadapt` command: a table of names and functions.

Each function stands in a file of its own and is imported when it is called, so that `moadapt --help` is quick.
"""

import errno
import importlib
import inspect
import json
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from moadapt.cli.signals import Interrupted, interruptible

# Name: (module, function, what it does). A function's typed signature and docstring make its options and help.
COMMANDS = {
    "compose": ("moadapt.cli.composing", "compose", "put adapters that others trained behind a router, as one mixture"),
    "demo": ("moadapt.cli.demo", "demo", "show the whole job on digit scenes, offline"),
    "doctor": ("moadapt.cli.doctor", "doctor", "tell what becomes of every tensor of an adapter, or why it is refused"),
    "inspect": ("moadapt.cli.inspecting", "inspect", "show a base's towers and sites, and what an adapter costs"),
    "list": (
        "moadapt.cli.listing",
        "list_parts",
        "list routers, families, initials, ranks, tasks, merges, objectives, bases, data sets",
    ),
    "merge": ("moadapt.cli.merging", "merge", "fold a mixture into one plain model, or into one LoRA"),
    "report": ("moadapt.cli.reporting", "report", "write a page about a finished run: what its routers learned"),
    "route": ("moadapt.cli.routing", "route", "put trained adapters behind a router, fit it, and tell how it routes"),
    "pretrain": ("moadapt.cli.pretrain", "pretrain", "make a shipped base again"),
}
# These are Lightning's and take `-c file.yaml`.
TRAINING = {
    "fit": "train a mixture",
    "validate": "score it on the validation split",
    "test": "score it on the test split",
    "predict": "write its answers to the test split",
    "search": "find the sites where its LoRAs are needed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: As typed, without the program's name; by default the process's own.

    Returns:
        The exit status: 0; 1 where a run could not go on, a disk is full, or the doctor refuses an adapter; 2 where the
        user gave something wrong; or 128 and the number of the signal that stopped it, of several processes in the
        first.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    if given[0] == "--version":
        from moadapt import __version__

        print(__version__)
        return 0
    try:
        with interruptible():
            return _run(given[0], given[1:])
    except Interrupted as stop:
        print(f"\n{stop} before anything new was saved; the same command starts from what is there", file=sys.stderr)
        return 128 + stop.number
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"moadapt {given[0]}: {error}; free space and give the same command again", file=sys.stderr)
        return 1
    except ValueError as error:
        if not _is_ours(error):
            raise
        print(f"moadapt {given[0]}: {error}", file=sys.stderr)
        return 2


def usage() -> str:
    """Return the list of commands."""
    every = {**TRAINING, **{name: about for name, (_, _, about) in COMMANDS.items()}}
    lines = [f"  {name:<10} {about}" for name, about in every.items()]
    return "\n".join(["usage: moadapt COMMAND [options]; moadapt COMMAND --help shows them", "", *lines])


def _is_ours(error: BaseException) -> bool:
    """Tell whether one of our parts raised an error: its message says what to do; others keep their traceback."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__", "")).startswith("moadapt")


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS and command not in TRAINING:
        raise ValueError(f"there is no such command\n{usage()}")
    from moadapt.cli.quiet import quiet
    from moadapt.training.keep_last import Stopped
    from moadapt.training.run_failed import RunFailed

    quiet()
    try:
        if command == "search":
            from moadapt.cli.search import Search

            Search(["fit", *arguments])
        elif command in TRAINING:
            from moadapt.cli.trainer import Interface

            Interface([command, *arguments])
        else:
            status = _call(command, arguments)
            return status if isinstance(status, int) else 0
    except Stopped as stop:
        if stop.process:  # a launcher takes a status that is not 0 for a crash, and kills the first process
            return 0
        print(f"\n{stop}; the same command goes on from there", file=sys.stderr)
        return 128 + stop.number
    except RunFailed as failure:
        print(f"\nmoadapt {command}: {failure}", file=sys.stderr)
        return 1
    return 0


def _call(command: str, arguments: list[str]) -> Any:
    """Let jsonargparse make the options of a function, and call it."""
    from jsonargparse import auto_cli

    from moadapt.cli.parser_messages import tidied

    module, function, _ = COMMANDS[command]
    try:
        part = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"{command} is not part of this installation") from error
    first = next(iter(inspect.signature(part).parameters.values()), None)
    if first is not None and first.annotation == list[str]:
        arguments = _gathered(arguments)
    if arguments and not arguments[0].startswith("-") and first is not None and first.default is not first.empty:
        arguments = [f"--{first.name}", *arguments]  # only needed parameters stand without their name
    try:
        return auto_cli(part, args=_with_flags(part, arguments), prog=f"moadapt {command}", exit_on_error=False)
    except ArgumentError as error:
        raise ValueError(tidied(str(error))) from error


def _gathered(arguments: list[str]) -> list[str]:
    """Make a list of the arguments before the first option."""
    count = next((index for index, each in enumerate(arguments) if each.startswith("-")), len(arguments))
    return [json.dumps(arguments[:count]), *arguments[count:]] if count else arguments


def _with_flags(part: Any, arguments: list[str]) -> list[str]:
    """Let an option that is true or false, and false by default, stand alone for true."""
    flags = {f"--{name}" for name, option in inspect.signature(part).parameters.items() if option.default is False}
    pairs = pairwise([*arguments, "--"])
    return [f"{each}=true" if each in flags and after.startswith("-") else each for each, after in pairs]
