"""The report of one recovery and the model card of its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from secateur.checkpoints.companions import CARD, SOURCE_CARD
from secateur.reports.markdown import change, table
from secateur.reports.plots import plot_curves
from secateur.reports.prune import REPORT, counts_table

CURVE: Final = "learning-curve.png"


def recovered_share(perplexity: dict[str, Any]) -> float | None:
    """How much of the way from the cut model back to its teacher was made; None without a teacher or a loss."""
    teacher, before = perplexity["teacher"], perplexity["before"]
    if teacher is None or not before > teacher:
        return None
    return float((before - perplexity["after"]) / (before - teacher))


def _request(recovery: dict[str, Any]) -> str:
    asked = recovery["requested"]
    options = ", ".join(f"{key}={value}" for key, value in asked["options"].items() if value is not None)
    taught = f"with teacher `{asked['teacher']}`" if asked["teacher"] else "without a teacher"
    return (
        f"`{asked['method']}` {taught}, {recovery['training']['steps']} steps, seed {asked['seed']}. Options: {options}"
    )


def _cut(record: dict[str, Any]) -> str:
    """What was cut before, as far as the record tells."""
    if "method" not in record:
        return ""
    sides = [record["before"], record["after"]]
    rows = [["residual width", *(side["residual"] for side in sides)], ["blocks", *(len(s["blocks"]) for s in sides)]]
    for key, label in (("ffn", "FFN neurons of each block"), ("kv", "key/value heads of each block")):
        rows.append([label, *(_spread([block[key] for block in side["blocks"]]) for side in sides)])
    cut = f"It had been cut by `{record['method']}`:"
    return f"{cut}\n\n{table(['size', 'before the cut', 'after the cut'], rows)}\n\n"


def _spread(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}" if len(set(values)) > 1 else str(values[0]) if values else "-"


def write_card(folder: Path, record: dict[str, Any], achieved: dict[str, int]) -> None:
    """The model card: only what the same request gives again, byte for byte."""
    recovery = record["recovery"][-1]
    training = recovery["training"]
    loads = table(["runtime", "loads"], [[name, state] for name, state in record["loads_in"].items()])
    origin = (
        f"\n\nThe card of the model it was made from is in `{SOURCE_CARD}`." if (folder / SOURCE_CARD).is_file() else ""
    )
    text = f"""---
library_name: transformers
tags: [pruned, recovered, secateur]
---

# Recovered with Secateur {recovery["secateur"]}

{achieved["params"]:,} parameters, {training["trainable_params"]:,} of them trained (or as many of adapters, merged
into the weights). Request: {_request(recovery)}.

{_cut(record)}{loads}

`secateur.json` holds the requests, the learning curve and the SHA-256 of every tensor.{origin}
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def write_report(
    folder: Path,
    record: dict[str, Any],
    achieved: dict[str, int],
    perplexity: dict[str, Any] | None,
    run: dict[str, str],
) -> None:
    """The report of a run, its measured times included, and its learning curve as a picture where matplotlib is there.

    Args:
        perplexity: ``before``, ``after``, ``teacher`` (or None), ``tokens``, ``context``.
        run: how the run went: seconds, peak memory, device, ...
    """
    recovery = record["recovery"][-1]
    parts = [f"# Secateur report\n\nRequest: {_request(recovery)}."]
    if perplexity is not None:
        parts += ["## Quality", _quality(perplexity)]
    parts += ["## Learning curve", _curve_table(recovery)]
    if _draw(folder / CURVE, recovery["curve"]):
        parts.append(f"![learning curve]({CURVE})")
    parts += ["## Sizes", f"{_cut(record)}{counts_table(achieved)}"]
    parts += ["## Run", table(["what", "value"], [[key, value] for key, value in run.items()])]
    data = recovery["data"]
    parts += [
        "## Hashes (SHA-256)",
        table(
            ["of", "value"], [[f"training text ({data['windows']} windows of {data['length']} tokens)", data["sha256"]]]
        ),
        "Those of every tensor are in `secateur.json`.",
    ]
    for key, title in (("passthrough", "Tensors that only travel along"), ("left_behind", "Files left behind")):
        if record[key]:
            parts += [f"## {title}", "\n".join(f"* `{name}`" for name in record[key])]
    (folder / REPORT).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _quality(perplexity: dict[str, Any]) -> str:
    what = f"perplexity ({perplexity['tokens']:,} tokens, windows of {perplexity['context']})"
    teacher = perplexity["teacher"]
    row = [
        what,
        *change(perplexity["before"], perplexity["after"], ".3f"),
        "-" if teacher is None else f"{teacher:.3f}",
    ]
    shown = table(["measure", "before", "after", "ratio", "teacher"], [row])
    share = recovered_share(perplexity)
    return shown if share is None else f"{shown}\n\n{share:.0%} of the way back to the teacher."


def _curve_table(recovery: dict[str, Any]) -> str:
    training = recovery["training"]
    rows = [
        [
            point["steps"],
            f"{point['rate']:.2e}",
            *(_nats(point[key]) for key in ("loss", "cross_entropy", "validation")),
        ]
        for point in recovery["curve"]
    ]
    shown = table(["step", "learning rate", "loss", "cross entropy", "held-back cross entropy"], rows)
    return (
        f"{training['steps']} steps, {training['tokens']:,} tokens from {training['windows']} windows;"
        f" {training['windows_held_back']} windows of the data were held back. The weights of step"
        f" {training['kept_step']} were kept. Loss and cross entropy are means since the line before, in nats"
        f" per token.\n\n{shown}"
    )


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _draw(path: Path, curve: list[dict[str, Any]]) -> bool:
    lines = {
        label: [(float(point["steps"]), float(point[key])) for point in curve if point[key] is not None]
        for key, label in (("cross_entropy", "training data"), ("validation", "held-back data"))
    }
    drawn = {label: points for label, points in lines.items() if points}
    return plot_curves(path, drawn, "step", "cross entropy, nats per token", logarithmic=False)
