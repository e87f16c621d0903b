"""The entry point: runs a command, and makes of every failure its message and its exit code."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import typer

from secateur.cli.commands import app, print_json
from secateur.engine.environment import leave_environment, place_in_environment
from secateur.errors import SecateurError

_SHARED: Final = "prune"
"""The command that several processes share; any other runs in the first of them."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every failure into its message and exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    _take_part(words)
    if not faulthandler.is_enabled():
        faulthandler.enable()  # where the system ends the process, say where it stood
    try:
        with _ended_like_an_interrupt():
            code = _run(words, as_json)
    except KeyboardInterrupt:
        message = "interrupted; the same command resumes"
        code = _fail({"code": "interrupted", "asked": "", "found": message, "hint": ""}, message, 130, as_json)
    sys.exit(code)


def _take_part(words: list[str]) -> None:
    """Of several processes, all take part in what is shared; anything else the first does alone, and the others end."""
    rank, count = place_in_environment()
    if count == 1:
        return
    if next((word for word in words if not word.startswith("-")), "") == _SHARED:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # broken connections are told of in a line of ours
        return
    if rank:
        print(f"secateur: process {rank} of {count} has nothing to do: only {_SHARED} is shared", file=sys.stderr)
        sys.exit(0)
    leave_environment()


@contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """SIGTERM clears up and says so as an interrupt from the keyboard does."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(words: list[str], as_json: bool) -> int:
    """The exit code of a command.

    Raises:
        KeyboardInterrupt: somebody ended it.
    """
    try:
        code = app(words, prog_name="secateur", standalone_mode=False)
        if code == 130:  # what typer makes of an interrupt inside a command
            raise KeyboardInterrupt
    except SecateurError as error:
        code = _fail(error.as_dict(), str(error), error.exit_code, as_json)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line
            message = error.format_message()
            content = {"code": "usage", "asked": " ".join(words), "found": message, "hint": "see: secateur --help"}
            code = _fail(content, f"{message} See: secateur --help", 2, as_json)
        else:
            if os.environ.get("SECATEUR_DEBUG"):
                raise
            found = f"{type(error).__name__}: {error}"
            hint = "set SECATEUR_DEBUG=1 for the traceback"
            content = {"code": "internal", "asked": " ".join(words), "found": found, "hint": hint}
            code = _fail(content, f"{found} ({hint})", 1, as_json)
    return code if isinstance(code, int) else 0


def _fail(content: dict[str, str], message: str, code: int, as_json: bool) -> int:
    rank, count = place_in_environment()
    if as_json and not rank:
        print_json({"error": content})
    who = f" (process {rank} of {count})" if rank else ""
    print(f"secateur{who}: {message}", file=sys.stderr)
    return code
