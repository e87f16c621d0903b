"""Batches of arrays from files: what a network is run on that takes no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from secateur.errors import refuse

LABELS: Final = "labels"
_ROWS: Final = 32
Array = NDArray[Any]


def read_batches(place: str | Path, inputs: Mapping[str, int | None]) -> list[tuple[dict[str, Array], Array | None]]:
    """Batches, with labels where there are some.

    Args:
        place: a file ``.npz`` with arrays by the names of the inputs, and ``labels``; a file ``.npy`` for a network
            with one input; or a folder of such files, read in the order of their names.
        inputs: names of the inputs, and how many rows one batch must have; None where any number will do.

    Returns:
        Batches of as many rows as each input asks for, or at most 32; what is left over is not used where the number
        is fixed. Arrays that have not the common number of rows go into every batch as they are.

    Raises:
        RequestError: no such file, no arrays, other names.
    """
    path = Path(place)
    files = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".npy")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        refuse("no-data", f"data {str(place)!r}", "there is no such file, or no .npy or .npz in that folder")
    return [batch for file in files for batch in _batches(_arrays(file, list(inputs)), inputs)]


def _arrays(file: Path, names: Sequence[str]) -> dict[str, Array]:
    """Arrays of one file by name."""
    try:
        loaded = np.load(file, allow_pickle=False)
        found = {names[0]: loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception as error:  # numpy and zipfile raise many types
        refuse("bad-data", f"data file {file.name!r}", f"no arrays can be read: {type(error).__name__}: {error}"[:300])
    missing = [name for name in names if name not in found]
    if missing:
        here = ", ".join(sorted(found)) or "none"
        refuse("bad-data", f"data file {file.name!r}", f"no array {missing[0]!r}; there are: {here}", _hint(names))
    return {name: array for name, array in found.items() if name in (*names, LABELS)}


def _hint(names: Sequence[str]) -> str:
    return f"name the arrays {', '.join(names)}, and those of the labels {LABELS}"


def _batches(
    arrays: Mapping[str, Array], inputs: Mapping[str, int | None]
) -> list[tuple[dict[str, Array], Array | None]]:
    counts = [len(arrays[name]) for name in inputs if arrays[name].ndim > 0]
    rows, fixed = max(counts, default=1), [size for size in inputs.values() if size is not None]
    step = fixed[0] if fixed else min(rows, _ROWS)
    if step < 1 or rows < step:
        refuse("bad-data", "data", f"{rows} rows, where a batch of the model has {step}")
    found: list[tuple[dict[str, Array], Array | None]] = []
    for start in range(0, rows - (step - 1 if fixed else 0), step):
        part = {n: a[start : start + step] if a.ndim and len(a) == rows else a for n, a in arrays.items()}
        found.append(({name: part[name] for name in inputs}, part.get(LABELS)))
    return found
