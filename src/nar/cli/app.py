"""The command `nar` itself, and what its verbs share: options, one-line errors."""

from __future__ import annotations

import ctypes
import io
import itertools
import re
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nar import __version__
from nar.storage.text import without_commands

_INTERRUPTED = 130
_NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")  # of torch, for CPU, Windows, GPUs
# Options that mean something without a text: words that say nothing, and what is not there.
_MAY_BE_EMPTY = {"--prompt", "--negative-prompt", "--clip-prefix", "--label", "--group", "--group-without"}
app = typer.Typer(
    name="nar",
    help="Fast autoregressive image and video generation. Every command has --help with an example.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command; what is expected to go wrong is one line on stderr and exit code 2, a bug one and code 1.

    The traceback is shown under --debug only.
    """
    _keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # consoles that lack a character
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not debug:
        warnings.showwarning = lambda message, *_, **__: _say(str(message))
    try:
        _refuse_empty(arguments)
        code = app(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if debug:
            raise
        described = _described(error)
        text = described or (
            f"unexpected {type(error).__name__}: {error} (this is a bug; the same command with --debug shows where)"
        )
        _say(text)
        code = 2 if described else 1
    if code == _INTERRUPTED:  # typer, too, makes this of Ctrl-C
        typer.echo("stopped", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse_empty(words: list[str]) -> None:
    """Raise ValueError for an option or a place without a text, which else would be a default or the folder of work."""
    for before, word in itertools.pairwise(["", *words]):
        option = before if not word else word[:-1] if re.fullmatch("--[a-z-]+=", word) else None
        if option is not None and option not in _MAY_BE_EMPTY:
            what = option if option.startswith("-") else "an argument"
            raise ValueError(f"{what} is empty; was a variable of the shell not set? Give a value, or leave it out")


def _say(text: str) -> None:
    """Print a warning or an error, in one line."""
    echo(f"nar: {' '.join(text.split())}", err=True)


def _described(error: Exception) -> str:
    """What went wrong, for people, where it is nobody's bug; else nothing."""
    # typer's own usage errors, whichever click they come from, know how to describe themselves.
    if describe := getattr(error, "format_message", None):
        return str(describe())
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return f"not enough memory: {text}"
    if isinstance(error, RecursionError):
        return f"an input is nested too deeply: {text}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return text if isinstance(error, ValueError | OSError | ImportError | ArithmeticError) else ""


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[  # noqa: ARG001 main() reads it, wherever it stands
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _keep_freed_memory() -> None:
    """Have glibc reuse the buffers of up to 32 MB that PyTorch frees, instead of asking for zeroed pages each time.

    On one core, encoding 64 clips took 0.75 of the time, a training step of a tokenizer 0.97 (two runs, alternating).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library: nothing to tune
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for parameter, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**26), (mmap_threshold, 2**25)):
        mallopt(parameter, value)


class Verbs(TyperGroup):
    """Sub-verbs where the first word is one; else all words are those of the verb itself, a MODEL among them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in self.commands:
            return super().parse_args(ctx, ["", *args])  # no MODEL
        ctx.allow_interspersed_args = True
        return super().parse_args(ctx, args)


def sizes(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"grid {text!r} must be whole numbers joined by x, such as 16x16 or 4x16x16")
    return tuple(map(int, sizes))


def refuse_unused(context: typer.Context, what: str, *unused: str) -> None:
    """Raise ValueError with those of some parameters that were given, where they would have no effect."""
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name in unused
        and getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]
    if given:
        given = [name if name.startswith("-") else name.upper() for name in given]
        raise ValueError(f"{what} does not use {', '.join(given)}; leave {'it' if len(given) == 1 else 'them'} out")


def echo(text: object, *, err: bool = False) -> None:
    """Print a text, whatever characters the names in it have."""
    typer.echo(without_commands(str(text)), err=err)
