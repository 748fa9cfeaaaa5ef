"""The parser and the entry point of all commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NoReturn

from scoresde.cli import compare, configs, convert, demo, likelihood, sample, train
from scoresde.cli.conditions import PREFIX, split_conditions
from scoresde.cli.own_code import HELP as IMPORT
from scoresde.cli.own_code import own_code
from scoresde.cli.processes import process_group, processes

COMMANDS: Mapping[str, ModuleType] = {
    "train": train,
    "sample": sample,
    "likelihood": likelihood,
    "compare": compare,
    "demo": demo,
    "convert": convert,
    "configs": configs,
}
"""Name -> its room: `HELP`, `arguments(parser)`, and `run(arguments, overrides)`."""

DIVIDED = ("sample", "likelihood", "compare")
"""Commands whose work the processes of torchrun divide; `train` makes a group of its own."""

_EPILOG = """\
Any field of the configuration can be set: --config.training.batch_size=64 --config.sde.name=ve.
Classes of your own: --import=my_module --config.network.name=my_module:MyNet --config.network.MyNet.width=32.
`scoresde configs` lists the shipped configurations; `scoresde COMMAND --help` explains a command.
`torchrun --nproc_per_node=N -m -- scoresde COMMAND …` has N processes do train, sample, likelihood or compare.
"""


_MISTAKES = (ArithmeticError, ImportError, OSError, TypeError, ValueError)
"""What the library raises for bad input."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line, without the `--config.…` overrides, which go to ml_collections."""
    shape: Any = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EPILOG}
    top = _Parser(prog="scoresde", description="Score-based generative models in continuous time.", **shape)
    top.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, room in COMMANDS.items():
        p = commands.add_parser(name, help=room.HELP, description=room.HELP, **shape)
        p.set_defaults(run=room.run)
        p.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=IMPORT)
        room.arguments(p)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 for a mistake of the user, 1 for what should not happen, 130 after
    Ctrl-C; training that was ended by another signal exits with 128 + its number."""
    arguments, rest = parser().parse_known_args(argv)
    named = f"scoresde {arguments.command}"
    try:
        divided = arguments.command in DIVIDED
        if processes() > 1 and not divided and arguments.command != "train":
            raise ValueError("this command runs in one process: start it without torchrun.")
        arguments.condition, overrides = split_conditions(_joined(rest))
        if arguments.condition and not getattr(arguments, "takes_conditions", False):
            raise ValueError("--condition.NAME=VALUE is for the commands sample, likelihood and compare.")
        with own_code(arguments.imports), process_group() if divided else nullcontext():
            arguments.run(arguments, overrides)
    except KeyboardInterrupt:
        print(f"{named}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.traceback:
            raise
        code = 2 if isinstance(error, _MISTAKES) else 1
        if processes() > 1 and _said_by_another(error):
            return code
        text = " ".join(str(error).split())
        unforeseen = f"{type(error).__name__}: {text[:400]} (`scoresde --traceback` shows where)"
        print(f"{named}: {f'error: {text}' if code == 2 else unforeseen}", file=sys.stderr)
        return code
    return 0


def _said_by_another(error: Exception) -> bool:
    """Whether the first process has this error, too, and this is another one."""
    from scoresde.storage.processes import told

    return told(error) and os.environ["RANK"] != "0"


def _joined(rest: list[str]) -> list[str]:
    """``--config.a 1`` as ``--config.a=1``, and ``--condition.a 1`` likewise."""
    joined: list[str] = []
    for word in rest:
        before = joined[-1] if joined else ""
        if before.startswith(("--config.", PREFIX)) and "=" not in before and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
