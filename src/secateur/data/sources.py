"""Where calibration text comes from: files, folders, standard input, token ids, a data set of the hub."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import refuse

Document = str | list[dict[str, Any]] | np.ndarray
"""A text, a chat (list of messages), or token ids."""

READABLE = (".txt", ".md", ".jsonl", ".parquet", ".npy")


def read_text(path: Path) -> str:
    """A UTF-8 text file; empty and binary ones are refused."""
    asked = f"text {str(path)!r}"
    if not path.is_file():
        refuse("no-text", asked, "there is no such file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("binary-text", asked, f"it is not UTF-8 text ({error.reason} at byte {error.start})")
    return _checked(text, asked)


def _checked(text: str, asked: str) -> str:
    if "\0" in text:
        refuse("binary-text", asked, "it holds NUL bytes, so it is binary")
    if not text.strip():
        refuse("empty-text", asked, "it is empty")
    return text


def documents(source: str, field: str = "text") -> Iterator[Document]:
    """Documents of a calibration source, in a fixed order.

    Args:
        source: file (.txt, .md, .jsonl, .parquet, .npy), folder of such files, ``-`` for standard input, or the id of
            a data set on the hub (its ``train`` split).
        field: column or key that holds the text in .jsonl, .parquet and data sets.

    Raises:
        RequestError: nothing readable there.
    """
    if source == "-":
        yield _checked(sys.stdin.read(), "calibration text on standard input")
        return
    path = Path(source)
    if path.exists():
        for file in source_files(source):
            yield from _from_file(file, field)
    elif source.count("/") <= 1 and not source.startswith((".", "/")) and not path.suffix:
        yield from _from_hub(source, field)
    else:
        refuse("no-data", f"data {source!r}", "there is no such file or folder")


def source_files(source: str) -> list[Path]:
    """The local files of a source, in the order in which they are read; none for a data set of the hub.

    Raises:
        RequestError: a folder without any.
    """
    path = Path(source)
    if not path.is_dir():
        return [path] if path.is_file() else []
    files = sorted(p for p in path.rglob("*") if p.suffix in READABLE and p.is_file())
    return files or refuse("no-data", f"data {source!r}", f"the folder holds no {', '.join(READABLE)} file")


def _from_file(path: Path, field: str) -> Iterator[Document]:
    readers: dict[str, Callable[[Path, str], Iterator[Document]]] = {
        ".jsonl": _from_jsonl,
        ".parquet": _from_parquet,
        ".npy": _from_npy,
    }
    reader = readers.get(path.suffix)
    if reader is not None:
        yield from reader(path, field)
    else:
        yield read_text(path)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """What stands in every line of a .jsonl file that is not empty, and which line that is."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            refuse("bad-jsonl", where, f"not JSON ({error})")
        yield where, record


def _from_jsonl(path: Path, field: str) -> Iterator[Document]:
    for where, record in json_lines(path):
        yield _document(record, field, where)


def _from_parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        refuse("no-pyarrow", f"data {str(path)!r}", "pyarrow is not installed", "pip install 'secateur[data]'")
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except Exception as error:  # pyarrow raises many kinds
        refuse("bad-parquet", f"data {str(path)!r}", f"not a readable parquet file ({error})")
    if field not in names and "messages" not in names:
        refuse(
            "no-field", f"column {field!r} of {path}", f"its columns are {', '.join(names)}", "name it: --text-field"
        )
    column = field if field in names else "messages"
    batches = file.iter_batches(columns=[column])
    while True:
        try:
            batch = next(batches, None)
            values = [] if batch is None else batch.column(0).to_pylist()
        except Exception as error:
            refuse("bad-parquet", f"data {str(path)!r}", f"not a readable parquet file ({error})")
        if batch is None:
            return
        for value in values:
            yield _document({column: value}, field, str(path))


def _from_npy(path: Path, field: str) -> Iterator[Document]:
    del field
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ids = np.load(path, mmap_mode="r", allow_pickle=False)  # never larger than the file, whatever it claims
    except Exception as error:  # its header is parsed as Python
        refuse("bad-npy", f"data {str(path)!r}", f"not a readable array ({error})")
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        refuse("bad-npy", f"data {str(path)!r}", f"{ids.dtype} of shape {list(ids.shape)}, not integer token ids")
    if not ids.size:
        refuse("empty-text", f"data {str(path)!r}", "it is empty")
    yield from (row.astype(np.int64) for row in np.atleast_2d(ids))


def _from_hub(name: str, field: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        hint = "or, for a data set of the hub, pip install 'secateur[data]'"
        refuse("no-data", f"data {name!r}", "there is no such file or folder", hint)
    try:
        rows = load_dataset(name, split="train", streaming=True)
        for row in rows:
            yield _document(row, field, f"data set {name}")
    except (OSError, ValueError) as error:
        refuse("no-data", f"data {name!r}", f"neither a local file nor a data set that can be fetched ({error})")


def _document(record: Any, field: str, asked: str) -> Document:
    if isinstance(record, dict):
        value = record.get(field, record.get("messages"))
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(m, dict) and "content" in m for m in value):
            return value
        keys = ", ".join(map(str, record)) or "none"
        refuse("no-field", f"field {field!r} of {asked}", f"its fields are {keys}", "name it: --text-field")
    refuse("no-field", f"field {field!r} of {asked}", f"a {type(record).__name__}, not an object")
