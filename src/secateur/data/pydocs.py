"""English documentation text that every Python installation carries.

Three sources of the running interpreter: the topics of ``help()`` (``pydoc_data.topics``), the docstrings of the
standard library and its block comments. A document is one topic or one source file. Documents are assigned to
``train``, ``valid`` and ``test`` by a hash of their name, so a document never changes sides between machines; its
text follows the Python version.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "valid", "test"]

_SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__", "ensurepip"}
_SHORTEST_DOCUMENT = 400  # characters; shorter files hold little but a licence line


def split_of(name: str) -> Split:
    """Side on which the document called ``name`` lies: 1/16 valid, 1/16 test, the rest train."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 16
    return {0: "test", 1: "valid"}.get(bucket, "train")  # type: ignore[return-value]


def documents(split: Split) -> Iterator[str]:
    """Texts of one split, in a fixed order. Only files of that split are parsed."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if split_of(name) == split:
            yield topics[name].strip()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.intersection(relative.parts) or split_of(relative.as_posix()) != split:
            continue
        text = _documentation(path)
        if len(text) >= _SHORTEST_DOCUMENT:
            yield text


def _documentation(path: Path) -> str:
    """Docstrings and block comments (two lines or more) of a source file, in the order of the file."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""
    pieces: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                pieces.append((node.body[0].lineno, docstring))
    comment: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], 1):
        stripped = line.strip()
        if stripped.startswith("#") and not stripped.startswith("#!"):
            comment.append(stripped.lstrip("#").strip())
            continue
        if len(comment) > 1:
            pieces.append((number, "\n".join(comment).strip()))
        comment = []
    return "\n\n".join(text for _, text in sorted(pieces) if text)
