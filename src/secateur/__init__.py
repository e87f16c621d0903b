"""Secateur makes trained networks smaller."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError
from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.api import (
        compare,
        delta_apply,
        delta_pack,
        evaluate,
        export,
        families,
        graph,
        inspect,
        load,
        methods,
        pack,
        preview,
        prune,
        recover,
        unpack,
    )

__all__ = [
    "SecateurError",
    "__version__",
    "compare",
    "delta_apply",
    "delta_pack",
    "evaluate",
    "export",
    "families",
    "graph",
    "inspect",
    "load",
    "methods",
    "pack",
    "preview",
    "prune",
    "recover",
    "unpack",
]
_API = frozenset(__all__) - {"SecateurError", "__version__"}


class _Package(ModuleType):
    """Some rooms (``families``, ``graph``, ``methods``) have the names of API functions, which win as attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _API and isinstance(value, ModuleType)):  # what an import of the room binds here
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import the API on first use, so that ``import secateur`` does not import torch."""
    if name in _API:
        from secateur import api

        return getattr(api, name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")
