"""The command line."""

from secateur.cli.main import main

__all__ = ["main"]
