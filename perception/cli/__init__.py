"""The command line: `perception COMMAND`, `python -m perception COMMAND`, and the same as `python scripts/COMMAND.py`.

Each module here is a command with a function `main(argv)`. Heavy imports stand inside the functions, so that `--help`
and refused arguments are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from perception.commands import COMMANDS, as_called, command
from perception.errors import run_script
from perception.files import check_writable

Number = TypeVar("Number", int, float)

DESCRIPTION = "Vision-only driving perception: calibrated cameras in, 3D boxes and a vector lane map out."


def command_parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser whose help shows the command as the user calls it.

    Args:
        name: of the command.
        description: the docstring of its module.
        examples: printed below the options, as written; `perception COMMAND` becomes what the user calls.
    """
    return argparse.ArgumentParser(
        prog=command(name),
        description=description,
        epilog=as_called(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def output_file(option: str) -> Callable[[str], Path]:
    """The type of an argument that names a file to write: the place is checked before any work.

    Args:
        option: name of the argument, for the message.
    """

    def parse(text: str) -> Path:
        check_writable(option, text)
        return Path(text)

    return parse


def output_folder(option: str) -> Callable[[str], Path]:
    """The type of an argument that names a folder to write to, as `output_file`."""

    def parse(text: str) -> Path:
        check_writable(option, text, folder=True)
        return Path(text)

    return parse


def number(kind: type[Number], low: float, high: float = math.inf) -> Callable[[str], Number]:
    """The type of an argument that is a number from `low` to `high`.

    Args:
        kind: int or float.
        low, high: the smallest and the largest value that makes sense.
    """

    def parse(text: str) -> Number:
        wanted = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        wanted = f"a {'whole ' if kind is int else ''}number {wanted}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {wanted}")
        return value

    return parse


def add_precision(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the option `--precision`, see `perception.inference.acceleration.accelerated`."""
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=default,
        help="of the network; auto is the fastest one of this device (default: %(default)s)",
    )


class _Import(argparse.Action):
    """Imports the modules while the arguments are read, before anything looks for what they register."""

    def __call__(self, parser: object, arguments: argparse.Namespace, values: Any, option: str | None = None) -> None:
        from perception.extensions import import_modules

        import_modules(values, "--import", Path())
        setattr(arguments, self.dest, values)


def add_import(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--import`, for networks, losses, datasets and hooks from outside the package."""
    parser.add_argument(
        "--import",
        dest="imports",
        nargs="+",
        action=_Import,
        metavar="MODULE",
        help="modules of your own that register a network, loss, dataset or hook, as custom_imports of a config does",
    )


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--launcher`, see `perception.engine.launchers`."""
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="none",
        help="what started the processes that share the work: torchrun, srun or mpirun (default: %(default)s)",
    )


SEED = number(int, 0, 2**32 - 1)  # what numpy and torch take


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs the command that the arguments name.

    Args:
        argv: the name of a command and its arguments; those of the process by default.

    Returns:
        The exit code, None for 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(f"perception.cli.{arguments[0].replace('-', '_')}")
        return module.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog=command("").strip(),
        description=DESCRIPTION,
        epilog="commands:\n"
        + "\n".join(f"  {name:20}{meaning}" for name, meaning in COMMANDS.items())
        + f"\n\n`{command('train')} --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below")
    parsed, _ = parser.parse_known_args(arguments)
    if parsed.version:
        from perception import __version__

        print(f"driving-perception {__version__}")
        return 0
    if parsed.command is None:
        parser.print_help()
        return 2
    near = difflib.get_close_matches(parsed.command, COMMANDS, n=1)
    fix = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    parser.error(f"there is no command {parsed.command!r}; {fix}")


def run(name: str | None = None) -> None:
    """Runs a command with the arguments of the process and exits: 2 with one sentence on stderr for bad input.

    Args:
        name: of the command; the first argument of the process names it by default.
    """
    run_script(main if name is None else lambda: main([name, *sys.argv[1:]]))
