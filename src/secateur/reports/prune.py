"""The report of one prune and the model card of its output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from secateur.checkpoints.companions import CARD, SOURCE_CARD
from secateur.meters.counts import PARTS, remaining, share_removed
from secateur.meters.evaluate import Figures
from secateur.plans import Chart, Plan
from secateur.reports.document import Charts, Document, Listing, Paragraph, Part, Section, Table, change
from secateur.reports.files import write_document
from secateur.reports.markdown import render_table, table

REPORT: Final = "secateur-report.md"
PAGE: Final = "secateur-report.html"
RECIPE: Final = "recipe.yaml"
UNITS: Final = {
    "ffn": "FFN neurons",
    "kv": "key/value heads",
    "group": "query heads of each key/value head",
    "shared": "neurons of the shared expert",
}
"""The sizes of a block, as people call them."""
_ALWAYS: Final = ("ffn", "kv")  # the others are told where they change
_SPEEDS: Final = {
    "prefill_tokens_per_second": "prefill tokens per second",
    "decode_tokens_per_second": "decode tokens per second",
}


@dataclass(frozen=True)
class PruneFacts:
    """What a report tells of a run.

    Attributes:
        model: as the user named it.
        record: the content of ``secateur.json``.
        plan: what was decided.
        achieved: counts before and after.
        parts: parameters of the parts of the model, before and after.
        recipe: the request as YAML.
        perplexity: before, after, context, tokens.
        speed: figures of ``evaluate_models`` for the dense and the pruned model.
        run: how the run went: seconds, peak memory, device, ...
        spearman: before, after, pairs.
    """

    model: str
    record: dict[str, Any]
    plan: Plan
    achieved: dict[str, int]
    parts: tuple[dict[str, int], dict[str, int]]
    recipe: str
    perplexity: dict[str, Any] | None
    speed: tuple[Figures, Figures] | None
    run: dict[str, str]
    spearman: dict[str, Any] | None = None


def sizes_table(record: dict[str, Any]) -> Table:
    """Sizes before and after the cut."""
    before, after = record["before"], record["after"]
    rows = [["residual width", *change(before["residual"], after["residual"])]]
    rows.append(["blocks", *change(len(before["blocks"]), len(after["blocks"]))])
    rows += [[f"{UNITS[key]} per block", *_per_block(before, after, key)] for key in _ALWAYS]
    rows.append(["query heads per block", *_per_block(before, after, "kv", "group")])
    tied = ["yes" if side["tied"] else "no" for side in (before, after)]
    rows.append(["tied embeddings", *tied, "-"])
    return Table(["size", "before", "after", "kept"], rows, "Sizes of the model")


def _per_block(before: dict[str, Any], after: dict[str, Any], key: str, times: str | None = None) -> list[str]:
    """Cells of a size that each block has: one number, or the least and the most of them."""
    shown, means = [], []
    for side in (before, after):
        found = [block[key] * (block[times] if times else 1) for block in side["blocks"]]
        low, high = min(found), max(found)
        shown.append(f"{low:,}" if low == high else f"{low:,} to {high:,}")
        means.append(sum(found) / len(found))
    return [*shown, f"{means[1] / means[0]:.1%}" if means[0] else "-"]


def counts_table(achieved: dict[str, int]) -> Table:
    """Parameters, bytes, FLOPs and cache before and after."""
    labels = {
        "params": "parameters",
        "nonzero": "parameters that are not zero",
        "factored_params": "parameters, with matrices as their factors",
        "bytes": "bytes of weight files",
        "factored_bytes": "bytes, with matrices as their factors",
        "flops_per_token": "FLOPs per token",
        "kv_bytes_per_token": "key/value cache bytes per token",
    }
    rows = [
        [label, *change(achieved[f"{key}_before"], achieved[key])] for key, label in labels.items() if key in achieved
    ]
    return Table(["measure", "before", "after", "kept"], rows, "Costs, counted from the files")


def _parts_table(before: dict[str, int], after: dict[str, int]) -> Table:
    rows = [[part, *change(before[part], after[part])] for part in PARTS if before[part] or after[part]]
    rows.append(["all", *change(sum(before.values()), sum(after.values()))])
    return Table(["part", "before", "after", "kept"], rows, "Parameters of each part")


def forms_table(packed: dict[str, Any]) -> Table:
    """Bytes of a packed output by the kind of storage, beside the dense ones and the bound."""
    keys = ("tensors", "bytes", "dense_bytes", "bound_bytes")
    rows = [[form, *(f"{facts[key]:,}" for key in keys)] for form, facts in packed["forms"].items()]
    rows.append(["files", "", *(f"{packed[key]:,}" for key in keys[1:])])
    return Table(["stored as", "tensors", "bytes", "dense bytes", "bound"], rows, "Bytes of the packed weights")


def _wanted(record: dict[str, Any]) -> str:
    asked = record["requested"]
    return (
        f"ratio {asked['ratio']}" if asked["ratio"] is not None else ", ".join(asked["target"]) or "the method's knob"
    )


def _options(record: dict[str, Any]) -> str:
    options = {key: value for key, value in record["requested"]["options"].items() if value is not None}
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "none"


def write_card(
    folder: Path, record: dict[str, Any], achieved: dict[str, int], auto: str = "AutoModelForCausalLM"
) -> None:
    """The model card: only what the same request gives again, byte for byte.

    Args:
        auto: the class of transformers that loads the model.
    """
    loads = table(["runtime", "loads"], [[name, state] for name, state in record["loads_in"].items()])
    origin = (
        f"\n\nThe card of the model it was made from is in `{SOURCE_CARD}`." if (folder / SOURCE_CARD).is_file() else ""
    )
    request = (
        f"`{record['method']}`, {_wanted(record)}, options: {_options(record)}, seed {record['requested']['seed']}"
    )
    loading = f'Loads with plain `transformers`:\n\n    {auto}.from_pretrained(".")'
    if "resize" in record:
        loading = (
            'Its layers differ in size. `secateur.load(".")` loads it, and so does `transformers` with the '
            f'modelling file in this folder:\n\n    {auto}.from_pretrained(".", trust_remote_code=True)'
        )
    if "packed" in record:
        loading = (
            'Its weights are packed (`packed*.safetensors`): `secateur.load(".")` loads them, and '
            "`secateur unpack . -o OUT` writes them as `model*.safetensors`.\n\n"
            f"Unpacked: {loading[0].lower()}{loading[1:]}"
        )
    gone = ("gone or zero" if _smaller(achieved) else "zero") if "nonzero" in achieved else "gone"
    gone = "saved where the factors are kept instead of their products" if "factored_params" in achieved else gone
    text = f"""---
library_name: transformers
tags: [pruned, secateur]
---

# Pruned with Secateur {record["secateur"]}

Request: {request}. {share_removed(achieved):.2%} of all parameters are {gone}, counted from the file.

{render_table(counts_table(achieved))}

{render_table(sizes_table(record))}

{loading}

{loads}

`secateur.json` holds the request, the sizes and the SHA-256 of every tensor.{origin}
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def _request(facts: PruneFacts) -> Section:
    record, data = facts.record, facts.record["data"]
    rows = [
        ["model", facts.model],
        ["method", record["method"]],
        ["wanted", _wanted(record)],
        ["options", _options(record)],
        ["layout", record["requested"]["layout"]],
        ["seed", record["requested"]["seed"]],
    ]
    if data is not None:
        rows.append(["calibration text", calibration(data)])
    return Section(
        "Request",
        [
            Table(["what", "value"], rows, "What was asked for", numbers=False),
            Paragraph(
                f"The same as a recipe, also in {RECIPE}; secateur prune --recipe {RECIPE} -o OUT repeats the run:"
            ),
            Listing(facts.recipe),
        ],
    )


def calibration(data: dict[str, Any]) -> str:
    """What was drawn, given its record."""
    if "pairs" in data:
        return f"{data['pairs']} pairs of texts of up to {data['length']} tokens"
    return f"{data['windows']} windows of {data['length']} tokens"


def _widths(facts: PruneFacts) -> Charts:
    """Kept sizes of every block, in the numbering of the dense model: a block that is gone keeps nothing."""
    before, after = facts.record["before"]["blocks"], facts.record["after"]["blocks"]
    kept = dict(zip(facts.plan.blocks, after, strict=True))
    charts = []
    for key, label in UNITS.items():
        series = {
            "before": [(float(i), float(block[key])) for i, block in enumerate(before)],
            "after": [(float(i), float(kept[i][key] if i in kept else 0)) for i in range(len(before))],
        }
        if key not in _ALWAYS and all(block[key] == before[i][key] for i, block in kept.items()):
            continue
        charts.append(Chart(f"{label[0].upper()}{label[1:]} per block", "block", label, series, kind="bars"))
    return Charts(charts)


def _compared(title: str, unit: str, before: float, after: float) -> Chart:
    series = {title: [(0.0, before), (1.0, after)]}
    return Chart(title, "model", unit, series, kind="bars", labels=("before", "after"))


def _quality(facts: PruneFacts) -> Section:
    rows, charts = [], []
    figures = facts.perplexity
    if figures is not None:
        what = f"perplexity ({figures['tokens']:,} tokens, windows of {figures['context']})"
        rows.append([what, *change(figures["before"], figures["after"], ".3f")])
        if max(figures["before"], figures["after"]) < float("inf"):
            charts.append(_compared("Perplexity", "perplexity, lower is better", figures["before"], figures["after"]))
    similar = facts.spearman
    if similar is not None:
        what = f"Spearman of {similar['pairs']:,} scored pairs"
        rows.append([what, *change(similar["before"], similar["after"], ".4f")])
        charts.append(_compared("Similarity", "Spearman, higher is better", similar["before"], similar["after"]))
    for key, label in _SPEEDS.items():
        before, after = (side[key] for side in facts.speed or ({key: None}, {key: None}))
        if before is not None and after is not None:
            rows.append([label, *change(before, after, ",.1f")])
            charts.append(_compared(f"{label[0].upper()}{label[1:]}", "tokens per second", before, after))
    if not rows:
        return Section("Quality and speed", [Paragraph("Not measured: the run was given no held-out text (--text).")])
    parts: list[Part] = [
        Table(["measure", "before", "after", "ratio"], rows, "Measured in the same run"),
        Charts(charts),
    ]
    return Section("Quality and speed", parts)


def _method(facts: PruneFacts) -> list[Section]:
    parts: list[Part] = []
    notes = facts.record["notes"]
    if notes:
        rows = [[key.replace("_", " "), value] for key, value in notes.items()]
        parts.append(Table(["note", "value"], rows, "Notes of the method", numbers=False))
    if facts.plan.charts:
        parts.append(Charts(facts.plan.charts))
    return [Section("What the method saw", parts)] if parts else []


def closing(record: dict[str, Any], run: dict[str, str], hashes: Table) -> list[Section]:
    """What stands at the end of every report: how it ran, what loads it, what it follows from, what was not touched."""
    loads = [[name, state] for name, state in record["loads_in"].items()]
    ran: list[Part] = [
        Table(["what", "value"], list(run.items()), "How the run went", numbers=False),
        Table(["runtime", "loads"], loads, "What loads the result", numbers=False),
    ]
    sections = [
        Section("Run", ran),
        Section("Hashes (SHA-256)", [hashes, Paragraph("Those of every tensor are in secateur.json.")]),
    ]
    for key, title in (("passthrough", "Tensors that only travel along"), ("left_behind", "Files left behind")):
        if record[key]:
            sections.append(Section(title, [Listing("\n".join(record[key]))]))
    return sections


def _smaller(achieved: dict[str, int]) -> bool:
    """Whether there are fewer parameters, zeros counted."""
    return achieved["params"] < achieved["params_before"]


def describe(facts: PruneFacts) -> Document:
    """The report of a run, its measured times included."""
    record, achieved = facts.record, facts.achieved
    data = record["data"]
    hashes = [["plan", record["plan_sha256"]]]
    if data is not None:
        hashes.insert(0, ["calibration text", data["sha256"]])
    sizes: list[Part] = [counts_table(achieved), _parts_table(*facts.parts), sizes_table(record), _widths(facts)]
    if "packed" in record:
        sizes.insert(1, forms_table(record["packed"]))
    sections = [
        _request(facts),
        Section("Sizes", sizes),
        _quality(facts),
        *_method(facts),
        *closing(record, facts.run, Table(["of", "value"], hashes, "What the result follows from", numbers=False)),
    ]
    zeros = "removed or set to zero" if _smaller(achieved) else "put zeros in the place of"
    done = zeros if "nonzero" in achieved else "removed"
    done = "found factors (in learned/) that save" if "factored_params" in achieved else done
    lead = (
        f"{record['method']} {done} {share_removed(achieved):.2%} of all parameters: {achieved['params_before']:,} "
        f"before, {remaining(achieved):,} after."
    )
    return Document("Secateur report", lead, sections)


def write_report(folder: Path, facts: PruneFacts) -> None:
    """Write the report as Markdown and as HTML."""
    write_document(describe(facts), folder / REPORT, folder / PAGE)
