"""The grid: every behaviour a written model must show, as plain functions over one cell (family, method, options).

A new method joins with one line in ``METHODS`` (and is covered with its defaults without it); a new family with
one line in ``models.FAMILIES``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import limits
import masking
import models
import secateur
from secateur.api import PruneResult
from secateur.checkpoints import Checkpoint, Folder
from secateur.engine.prepare import prepare
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.engine.run import Run
from secateur.errors import RequestError
from secateur.methods.base import ZEROS
from secateur.methods.registry import checkpoint_methods, make_method
from secateur.plans import Plan

Options = dict[str, Any]
SPACES = ("ffn", "kv", "residual", "blocks")
KINDS = ("ffn", "experts", "kv", "heads", "residual", "blocks")
REPORT = "secateur-report.md"
TIMED = (REPORT, "secateur-report.html")
"""Files that hold measured times, and so differ between two runs."""
SELECTION, ROTATION = 1e-10, 1e-5


@dataclass(frozen=True)
class Row:
    """How the grid runs a method: ``options`` in CI, ``more`` in the full grid too, ``per_layer`` in that layout.

    ``not_native``: why the method has the per-layer layout only; every native cell is refused with it.
    """

    options: tuple[Options, ...] = ({},)
    more: tuple[Options, ...] = ()
    per_layer: tuple[Options, ...] = ()
    not_native: str = ""


_SPACES = tuple({"spaces": kind} for kind in SPACES)
_EXPERTS = {"spaces": "experts"}
_WEIGHTS: tuple[Options, ...] = tuple(
    {"spaces": "weights", **o} for o in ({}, {"pattern": "2:4"}, {"allocation": "block"}, {"pattern": "3x5"})
)
METHODS: dict[str, Row] = {
    "bits_back": Row(
        not_native="it is about the rotations of every norm, and stock classes have no place for their shortcuts"
    ),
    "random": Row((*_SPACES, _EXPERTS, {"spaces": "weights"}), per_layer=(_EXPERTS,)),
    "magnitude": Row(
        (*_SPACES, _EXPERTS, *_WEIGHTS[:2]),
        (*_WEIGHTS[2:], *({"spaces": k, "of": of} for k in SPACES for of in ("first", "reader"))),
    ),
    "slicegpt": Row(({}, {"basis": "subset"}), ({"tie": "keep"}, {"basis": "random"}, {"orientation": "random"})),
    "prunenet": Row(),
    "cfsp": Row(({},), ({"fine": "matrix"}, {"fine": "activation"}), per_layer=({},)),
    "joint": Row(({},), ({"passes": 2},), per_layer=({},)),
    "fasp": Row(({},), ({"metric": "obs"}, {"restore": False}), per_layer=({"targets": "ffn+vo"},)),
    "flap": Row(({},), ({"metric": "wifn"}, {"bias": False}), per_layer=({}, {"structure": "al-mm", "heads": 0.3})),
    "modegpt": Row(per_layer=({}, {"modules": "ffn+vo", "sequential": True})),
    "shortgpt": Row(({}, {"contiguous": True}), ({"metric": "angular"}, {"metric": "relative"})),
    "blockpruner": Row(more=({"objective": "kl"},)),
    "llm_pruner": Row(
        ({}, {"mode": "channel"}),
        ({"taylor": "param_mix"}, {"iterative_steps": 2}, {"mode": "channel", "iterative_steps": 2}),
        ({"mode": "channel"},),
    ),
    "adapt_pruner": Row(not_native="its sizes differ from block to block, and stock classes give all blocks one"),
    "dotresize": Row(({}, {"spaces": "ffn"}), ({"cost": "squared"},), ({},)),
    "wanda": Row(({}, {"pattern": "2:4"}), ({"allocation": "owl"}, {"allocation": "global", "within": "matrix"})),
    "sparsegpt": Row(({}, {"pattern": "2:4"}), ({"act_order": True}, {"allocation": "lamp"}, {"columns": 7})),
    "synflow": Row(({"steps": 3},), ({"steps": 20, "allocation": "lamp"},)),
    **dict.fromkeys(("lamp", "global_mp", "random_pruning_erk"), Row()),
    "rd_dp_allocation": Row(({"grid": 4},), ({"grid": 4, "unit": "matrix"},)),
    "ecoflap": Row(({"draws": 1},), ({"draws": 1, "unit": "matrix"},)),
    "snip": Row(({},), ({"steps": 3}, {"allocation": "uniform"})),
    "grasp": Row(),
    "d_pruner": Row(({},), ({"penalty": "step"}, {"allocation": "global"})),
    "gaprune": Row(({},), ({"literal": True}, {"part": "all"})),
    "armor": Row(
        ({"pattern": "2:4", "sweeps": 1},),
        ({"pattern": "1:3", "proxy": "diagonal", "sweeps": 2}, {"optimiser": "adam", "proxy": "diagonal", "steps": 5}),
    ),
    "ria": Row(
        ({}, {"pattern": "2:4", "permute": "fold"}), ({"pattern": "4:8"}, {"pattern": "2:4", "permute": "free"})
    ),
    "stun": Row(
        ({}, {"similarity": "mix", "representative": "busiest"}, {"weights": "wanda"}),
        (
            {"similarity": "coactivation", "together": "unlike"},
            {"similarity": "traffic"},
            {"average": 3},
            {"weights": "sparsegpt", "part": "all", "average": 3},
        ),
        ({}, {"similarity": "traffic", "representative": "busiest"}, {"weights": "wanda", "allocation": "owl"}),
    ),
    "dynamic_slicing": Row(not_native="its layers differ in width, and stock classes do not"),
    "disp_llm": Row(
        ({"mode": "fisher"},),
        per_layer=({"steps": 8, "batch_tokens": 64},),
        not_native="stock classes have no place for selections that differ",
    ),
}
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
LOW_RANK_FLOW = "attention of low rank (latent_q)"
ROUTED_STREAM = "ffn_read: experts are called together, and their module takes and gives the whole stream"
RATIOS = {"experts": 0.09, "kv": 0.08, "heads": 0.05, "blocks": 0.2, "dense-zeros": 0.25}
"""By kind of the units, or of an output that is more than smaller."""
_RATIO = 0.15
LAYOUTS = ("native", "per-layer")
WIDE = ("llama", "gpt2", "mixtral")
"""Families that run every method in CI."""
HOMES = (*WIDE, "opt", "qwen2", "qwen3", "gemma-one")
"""Families that run every method in its per-layer form in CI."""
FIRST = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "opt",
    "mixtral",
    "llama-tied",
    "llama-mha",
    "qwen2-full",
    "gpt2-inner",
)
"""Those that run every method with all its options in the full grid."""


@dataclass(frozen=True)
class Cell:
    """One prune of the grid."""

    family: str
    method: str
    options: Options = field(default_factory=dict)
    layout: str = "native"

    def __str__(self) -> str:
        return "-".join([self.family, self.row])

    @property
    def row(self) -> str:
        """Everything but the family."""
        words = [self.method, *(f"{k}={v}" for k, v in self.options.items())]
        return "-".join(words if self.layout == "native" else [*words, self.layout])

    @property
    def kind(self) -> str:
        """Kind of the units that go."""
        made: str = make_method(self.method, self.options).cuts  # type: ignore[assignment]
        return made

    @property
    def ratio(self) -> float:
        """How much goes."""
        return RATIOS.get(self.output, RATIOS.get(self.kind, _RATIO))

    @property
    def output(self) -> str:
        """Kind of the result; with ``zeros`` and ``factors`` no unit goes."""
        return make_method(self.method, self.options).output

    @property
    def refused(self) -> str:
        """Why the layout has to refuse; empty where it does not."""
        row = METHODS.get(self.method, Row())
        if self.method == "synflow" and self.family.startswith("deepseek_v3"):
            return LOW_RANK_FLOW
        if self.output in ("zeros", "factors"):
            return ""
        if row.not_native and self.layout == "native":
            return row.not_native
        reasons = limits.reasons(self.family, self.kind, self.layout)
        if self.method == "dynamic_slicing" and self.family.startswith(ROUTED):
            reasons = (*reasons, ROUTED_STREAM)
        return "; ".join(reasons)


def rows(method: str, full: bool) -> list[Options]:
    """Options of a method in the grid."""
    row = METHODS.get(method, Row())
    return [*row.options, *(row.more if full else ())]


def layouts(method: str) -> tuple[str, ...]:
    """Layouts in which every method runs: the native one, or both where that only has to be refused."""
    return LAYOUTS if METHODS.get(method, Row()).not_native else LAYOUTS[:1]


def first_cell(family: str, method: str) -> Cell:
    """A method in its last layout, with the first options it has there."""
    row, layout = METHODS.get(method, Row()), layouts(method)[-1]
    own = row.per_layer if layout == "per-layer" else ()
    return Cell(family, method, _Frozen((own or row.options)[0]), layout)


def ci_cells() -> list[Cell]:
    """Every method x a few families; every family x {magnitude of the FFN, slicegpt}, where they are not refused."""
    of = {m: [(_Frozen(o), layout) for o in rows(m, False) for layout in layouts(m)] for m in checkpoint_methods()}
    wide = {Cell(f, m, o, layout) for f in WIDE for m, cells in of.items() for o, layout in cells}
    basic = (("magnitude", _Frozen(spaces="ffn")), ("slicegpt", _Frozen()), ("fasp", _Frozen()))
    every = {Cell(f, m, o) for f in models.FAMILIES for m, o in basic}
    more = {Cell(f, "magnitude", _Frozen(spaces=k)) for f, k in _MORE}
    shared = {Cell(f, "slicegpt", _Frozen({"tie": "keep"})) for f in ("llama-tied", "qwen2-full")}
    possible = {cell for cell in every if not cell.refused}
    rotated = {Cell(f, "slicegpt", _Frozen(), "per-layer") for f in ("gpt_neox", "granite", "deepseek_v3")}
    homes = {cell for f in HOMES for cell in per_layer_cells(f)}
    homes |= {Cell("deepseek_v3", m, _Frozen(), "per-layer") for m in ("modegpt", "flap", "joint")}
    alone = {Cell(f, "flap", _Frozen()) for f in ("bloom", "deepseek_v3")} | {
        Cell("olmo2", "flap", _Frozen(), "per-layer")
    }
    uneven = {Cell(f, m, _Frozen(), "per-layer") for f in WIDE for m in ("llm_pruner", "blockpruner")}
    return sorted(wide | possible | more | shared | rotated | uneven | homes | alone, key=str)


def per_layer_cells(family: str) -> list[Cell]:
    """Methods that have a form of their own in the per-layer layout, in one family."""
    return [Cell(family, m, _Frozen(o), "per-layer") for m, row in METHODS.items() for o in row.per_layer]


_MORE = (
    ("qwen3", "kv"),
    ("phi3", "kv"),
    ("gemma-one", "heads"),
    ("gemma", "residual"),
    ("cohere", "residual"),
    ("smollm3", "blocks"),
    ("qwen2_moe-dense", "blocks"),
    ("bloom", "kv"),
    ("qwen2_moe", "experts"),
    ("qwen3_moe", "experts"),
    ("olmoe", "experts"),
    ("gpt_oss", "experts"),
)
"""Other spaces that CI cuts, each the first of its sort."""


def method_cells() -> list[Cell]:
    """Every method x the first families x all its options."""
    return [
        Cell(f, m, _Frozen(o), s)
        for m in checkpoint_methods()
        for f in FIRST
        for o in rows(m, True)
        for s in layouts(m)
    ]


def family_cells() -> list[Cell]:
    """Every family x every space x both layouts, by magnitude, sizes that differ too; other methods with defaults."""
    found = [Cell(f, "magnitude", _Frozen(spaces=k), s) for f in models.ALL for k in KINDS for s in LAYOUTS]
    ranked = [_Frozen(spaces=k, allocation="global") for k in ("ffn", "kv")]
    found += [Cell(f, "magnitude", o, "per-layer") for f in models.ALL for o in ranked]
    found += [Cell(f, "slicegpt", _Frozen(), "per-layer") for f in models.ALL]
    found += [cell for f in models.ALL for cell in per_layer_cells(f) if not cell.options or f in HOMES]
    others = {m: _Frozen(rows(m, False)[0]) for m in checkpoint_methods() if m not in ("magnitude", "random")}
    found += [Cell(f, m, o, s) for f in models.ALL for m, o in others.items() for s in layouts(m)]
    found += [Cell(f, m, _Frozen(), "per-layer") for f in models.ALL for m in ("llm_pruner", "blockpruner")]
    return found


def full_cells() -> list[Cell]:
    """Everything, each cell once."""
    return list(dict.fromkeys([*family_cells(), *method_cells()]))


class _Frozen(dict[str, Any]):
    """Options as part of a cell that goes into a set."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


# -- one prune -------------------------------------------------------------------------------------------------------


def arguments(cell: Cell, folder: Path) -> dict[str, Any]:
    """Keyword arguments of the prune of a cell; writes the calibration text where the method needs one."""
    found: dict[str, Any] = {
        "method": cell.method,
        "ratio": None if make_method(cell.method, cell.options).sized else cell.ratio,
        "options": dict(cell.options),
        "layout": cell.layout,
    }
    if make_method(cell.method, cell.options).data == "text":
        notes = folder / "notes.txt"
        notes.write_text(models.text(200))
        found.update(data=str(notes), samples=8, length=32)
        if make_method(cell.method, cell.options).group == "domain":
            domain = folder / "domain.txt"
            domain.write_text(models.text(200, seed=3))
            found["options"]["domain"] = str(domain)
    return found


def plan_of(model: Path, scratch: Path, **options: Any) -> tuple[Plan, str]:
    """The plan of a request and its digest, without writing an output."""
    run = Run(prepare(make_request({"model": str(model), **options})), scratch, Silent())
    return run.plan(), Plan.digest(run.work)


def hashes(folder: Path, *without: str) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in without)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# -- behaviours ------------------------------------------------------------------------------------------------------


def check_masked(model: Path, output: Path, family: str, plan: Plan) -> None:
    """The written model computes what the dense one computes with the removed units silenced."""
    ids, where = models.token_ids(), models.ALL[family].where
    assert models.config(model)["dtype"] == "float64"
    for precise in (False, True):
        dense, cut = (models.load(f, dtype=torch.float64, experts_implementation="eager") for f in (model, output))
        untouched = masking.logits(dense, ids)
        masking.put(dense, edited_state(model, plan))
        if precise:
            masking.swap_precise_parts(dense)
            masking.swap_precise_parts(cut)
        expected = masking.logits(masking.mask(dense, where, plan), ids)
        error = masking.difference(expected, masking.logits(cut, ids))
        bound = SELECTION if precise else ROTATION
        assert error < bound, f"masked and cut differ by {error:.2e}, more than {bound:g}"
        assert masking.difference(untouched, expected) > 1e-3, "the mask changes nothing: the oracle proves nothing"


def edited_state(model: Path, plan: Plan) -> dict[str, torch.Tensor]:
    """Parameters of the stock model that the plan's edits and masks change."""
    checkpoint = Checkpoint(Folder(model))
    state = {}
    for place in checkpoint.architecture.places:
        edits, masks = plan.edits_of(place), plan.masks_of(place)
        if changed := {*edits, *masks}:
            tensors = {**checkpoint.read(place), **edits}
            tensors |= {name: tensors[name] * mask for name, mask in masks.items()}
            touched = (p for p in checkpoint.architecture.packed_of(place) if set(p.canonical) & changed)
            state.update({packed.name: packed.pack(tensors) for packed in touched})
    return state


def check_counts(result: PruneResult, output: Path) -> None:
    """Achieved == counted from the file == parameters of the stock model loaded from it."""
    model = models.load(output)
    unique = {id(p): p.numel() for p in model.parameters()}
    assert result.achieved["params"] == sum(unique.values())
    on_disk = 0
    for file in output.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                repeated = name == "lm_head.weight" and model.config.tie_word_embeddings
                buffer = name.endswith((".attn.bias", ".e_score_correction_bias", "read_index", "write_index"))
                on_disk += 0 if repeated or buffer else torch.Size(handle.get_slice(name).get_shape()).numel()
    assert result.achieved["params"] == on_disk
    assert result.achieved["bytes"] == sum(f.stat().st_size for f in output.glob("*.safetensors"))
    if not {"nonzero", "factored_params"} & set(result.achieved):
        assert result.achieved["params"] < result.achieved["params_before"]


def check_zeros(result: PruneResult, model: Path, output: Path, plan: Plan) -> None:
    """Exactly as many weights are zero as were to go; the others are as they were, unless the method mends them."""
    before, after = (dict(models.load(folder).named_parameters()) for folder in (model, output))
    counted = [sum(int((values != 0).sum()) for values in of.values()) for of in (before, after)]
    assert counted == [result.achieved["nonzero_before"], result.achieved["nonzero"]]
    gone = sum(int((~plan.masks[name]).sum()) for name in plan.masks)
    gone += result.achieved["params_before"] - result.achieved["params"]
    if plan.notes["weights"]["pattern"] == "element":
        assert gone == round(result.requested["ratio"] * result.achieved["params_before"])
    assert counted[0] - counted[1] == gone
    block = plan.notes["weights"]["pattern"].partition("x")  # whole ones stay or go: to the nearest of them
    off = int(block[0]) * int(block[2]) / 2 if block[1] else 0
    assert plan.masks.keys() == plan.counts.keys()
    assert all(abs(int(plan.masks[name].sum()) - count) <= off for name, count in plan.counts.items())
    if not len(plan.edits) and not plan.kept:
        assert all(bool(((values == before[name]) | (values == 0)).all()) for name, values in after.items())


def check_record(output: Path, digest: str) -> None:
    """``secateur.json`` holds the plan's digest and those of all tensors."""
    record = json.loads((output / "secateur.json").read_text())
    assert record["plan_sha256"] == digest
    found = {}
    for file in output.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                data = handle.get_tensor(name).contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[name] = hashlib.sha256(data).hexdigest()
    assert record["tensors"] == found


def refusal(model: Path, output: Path, options: dict[str, Any]) -> RequestError | None:
    """How a prune is refused; None when it is not."""
    try:
        secateur.prune(model, output=output, **options)
    except RequestError as error:
        return error
    return None


def run_cell(cell: Cell, folder: Path) -> str:
    """All behaviours of one cell.

    Returns:
        ``ok``, or ``refused: ...`` where the layout has to refuse.
    """
    model = models.save(folder / "model", cell.family, torch.float64)
    before, options = hashes(model), arguments(cell, folder)
    output = folder / "out"
    if cell.refused:
        error = refusal(model, output, options)
        assert error is not None, "this cannot be cut, and it was not refused"
        expected = "not-native" if cell.layout == "native" else "not-exact"
        assert error.exit_code == 2
        assert error.code == ("not-supported" if cell.refused == LOW_RANK_FLOW else expected)
        assert error.found == cell.refused
        assert {p.name for p in folder.iterdir()} <= {"model", "notes.txt"}, "a refusal leaves something behind"
        assert hashes(model) == before
        return f"refused: {error.found}"
    result = secateur.prune(model, output=output, **options)
    plan, digest = plan_of(model, folder / "planned", **options)
    check_masked(model, output, cell.family, plan)
    check_counts(result, output)
    if cell.output in ZEROS:
        check_zeros(result, model, output, plan)
    check_record(output, digest)
    secateur.prune(model, output=folder / "again", **options)
    assert hashes(output, *TIMED) == hashes(folder / "again", *TIMED), "the same seed gives other bytes"
    assert hashes(model) == before, "the input was touched"
    return "ok"
