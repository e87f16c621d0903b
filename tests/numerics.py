"""Models and texts on which arithmetic is hard, and every method on them: finite weights, or a refusal that says where.

``python tests/numerics.py`` runs every method on every one of them and writes the table in ``docs/reliability.md``.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import grid
import models
import secateur
from secateur.errors import SecateurError
from secateur.methods.registry import checkpoint_methods, make_method
from secateur.reports.documentation import regenerate
from secateur.reports.markdown import table

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Something hard.

    Attributes:
        edit: changes the tensors of a good model.
        stored: type of the tensors on disk.
        more: arguments of the prune that differ.
        ids: token ids to calibrate on, in the place of a text.
        only_refused: whether nothing but a refusal will do.
    """

    edit: Callable[[Tensors], object] = len  # which changes nothing
    stored: torch.dtype = torch.float32
    more: Mapping[str, Any] = field(default_factory=dict)
    ids: np.ndarray[Any, Any] | None = None
    only_refused: bool = False


def _fill(value: float, *ends: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(ends):
                tensor.fill_(value)

    return edit


def _one(value: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    return edit


def _dead(tensors: Tensors) -> None:
    """Half of the neurons give nothing, and half of the value heads."""
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "v_proj.weight")):
            tensor[: len(tensor) // 2] = 0


def _twins(tensors: Tensors) -> None:
    """All neurons of a block say the same, and so do all heads."""
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight", "v_proj.weight")):
            tensor.copy_(tensor[:1].expand_as(tensor).clone())


def _outliers(scale: float) -> Callable[[Tensors], None]:
    """One dimension of the stream is far larger than all others, and some neurons than their neighbours."""

    def edit(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][:, 3] *= scale
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                tensor[5] *= scale

    return edit


def _loud(tensors: Tensors) -> None:
    """Weights near the largest number of float16, and products far beyond."""
    for name, tensor in tensors.items():
        if name.endswith(("down_proj.weight", "up_proj.weight")):
            tensor.mul_(6e4 / tensor.abs().max())


CASES: dict[str, Case] = {
    "a matrix of every kind is zero": Case(
        lambda t: [_fill(0, f"layers.1.{m}.weight")(t) for m in ("mlp.down_proj", "self_attn.v_proj", "mlp.gate_proj")]
    ),
    "all matrices of a block are zero": Case(
        lambda t: _fill(0, *(n for n in t if ".layers.1." in n and "proj" in n))(t)
    ),
    "all matrices are zero": Case(lambda t: _fill(0, "proj.weight")(t)),
    "half of the neurons and heads are dead": Case(_dead),
    "all neurons and heads are alike": Case(_twins),
    "outliers a thousand times as large": Case(_outliers(1e3)),
    "outliers a million times as large": Case(_outliers(1e6)),
    "outliers of 1e30": Case(_outliers(1e30)),
    "one window of one token": Case(ids=np.array([[5]]), more={"samples": 1, "length": 1}),
    "one window of two tokens": Case(ids=np.array([[5, 6]]), more={"samples": 1, "length": 2}),
    "always the same token": Case(ids=np.full((8, 16), 7), more={"length": 16}),
    "computed in float16": Case(more={"dtype": "float16"}),
    "computed in bfloat16": Case(more={"dtype": "bfloat16"}),
    "computed in float16, overflowing": Case(_outliers(1e5), more={"dtype": "float16"}),
    "stored in float16, near its largest number": Case(_loud, torch.float16),
    "a NaN in a weight": Case(_one(float("nan")), only_refused=True),
    "an infinite weight": Case(_one(float("inf")), only_refused=True),
}


def make(case: Case, folder: Path) -> Path:
    """The model of a case."""

    def edit(tensors: Tensors) -> Tensors:
        found = {name: tensor.float() for name, tensor in tensors.items()}
        case.edit(found)
        return {name: tensor.to(case.stored) for name, tensor in found.items()}

    return models.save(folder, dtype=case.stored, edit=edit)


def refused(model: Path, out: Path, asked: dict[str, Any]) -> SecateurError | None:
    """What a prune was refused for, if it was."""
    try:
        secateur.prune(model, output=out, **asked)
    except SecateurError as error:
        return error
    return None


def outcome(method: str, name: str, folder: Path) -> str:
    """``written`` or the code of the refusal.

    Raises:
        AssertionError: something that is not finite was written, or a refusal does not say where.
        Exception: whatever else came out.
    """
    case = CASES[name]
    model = folder / "model"
    if not model.is_dir():
        make(case, model)
    cell = grid.first_cell("llama", method)
    asked = {**grid.arguments(cell, folder), "seed": 0}
    if "data" in asked:
        if case.ids is not None:
            np.save(folder / "ids.npy", case.ids)
            asked["data"] = str(folder / "ids.npy")
        asked |= case.more
    out = folder / f"out-{method}"
    refusal = refused(model, out, asked)
    if refusal is not None:
        assert refusal.exit_code == 2, refusal
        assert not out.exists()
        assert all((refusal.asked, refusal.found)), "a refusal that says nothing"
        where = ("block ", "tensor ", "blocks.", "calibration window") if refusal.code == "not-finite" else ("",)
        assert any(word in str(refusal) for word in where), f"it does not say where: {refusal}"
        return refusal.code
    for file in out.rglob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{file.name}: {key} is not finite"
    assert not case.only_refused, "it was written"
    return "written"


def _at_home() -> list[str]:
    """Methods that cut the model when nothing about it is hard; one without experts has nothing for some."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(Case(), folder / "model")
        return [
            method
            for method in checkpoint_methods()
            if refused(model, folder / method, {**grid.arguments(grid.first_cell("llama", method), folder), "seed": 0})
            is None
        ]


def main() -> None:
    """Every method on every case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = sys.argv[1].split(",") if len(sys.argv) > 1 else _at_home()
    found: dict[str, dict[str, list[str]]] = {name: {} for name in CASES}
    wrong = []
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for method in names:
                started = time.perf_counter()
                if CASES[name].more and make_method(method, {}).data == "none" and not CASES[name].only_refused:
                    continue  # it computes with no data
                try:
                    what = outcome(method, name, Path(folder))
                except Exception as error:
                    what = "FAILED"
                    wrong.append(f"{name}, {method}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    print(wrong[-1], file=sys.stderr, flush=True)
                found[name].setdefault(what, []).append(method)
                print(f"{name}, {method}: {what}, {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    rows = [
        [
            name,
            len(of.get("written", [])),
            "; ".join(f"{what}: {', '.join(m)}" for what, m in of.items() if what != "written"),
        ]
        for name, of in found.items()
    ]
    text = table(["model or data", "methods that wrote finite weights", "methods that refused, and why"], rows)
    if len(sys.argv) > 1:
        print(text)
    else:
        page = Path(__file__).parents[1] / "docs" / "reliability.md"
        page.write_text(regenerate(page.read_text(encoding="utf-8"), {"numerics": lambda: text}), encoding="utf-8")
    sys.exit(f"{len(wrong)} failed" if wrong else 0)


if __name__ == "__main__":
    main()
