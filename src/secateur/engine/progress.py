"""Progress as the engine tells it; who shows it is decided at the doors."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what a run does."""

    def start(self, what: str, total: int) -> None:
        """A sweep of ``total`` steps begins."""

    def step(self, done: int) -> None:
        """``done`` steps of the sweep are finished."""

    def note(self, message: str) -> None:
        """Something worth a line."""


class Silent:
    """No progress."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, done: int) -> None: ...

    def note(self, message: str) -> None: ...
