"""The entry point: runs a command, and makes of every failure its message and its exit code."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from secateur.cli.commands import app, print_json
from secateur.errors import SecateurError


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every failure into its message and exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    if not faulthandler.is_enabled():
        faulthandler.enable()  # where the system ends the process, say where it stood
    try:
        with _ended_like_an_interrupt():
            code = _run(words, as_json)
    except KeyboardInterrupt:
        message = "interrupted; the same command resumes"
        code = _fail({"code": "interrupted", "asked": "", "found": message, "hint": ""}, message, 130, as_json)
    sys.exit(code)


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
    if as_json:
        print_json({"error": content})
    print(f"secateur: {message}", file=sys.stderr)
    return code
