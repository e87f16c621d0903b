"""The report of one prune and the model card of its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from secateur.meters.evaluate import Figures
from secateur.reports.markdown import change, table

REPORT: Final = "secateur-report.md"
CARD: Final = "README.md"


def _sizes_table(record: dict[str, Any]) -> str:
    before, after = record["before"], record["after"]
    rows = [["residual width", *change(before["residual"], after["residual"])]]
    rows.append(["blocks", *change(len(before["blocks"]), len(after["blocks"]))])
    for key, label in (("ffn", "FFN neurons"), ("kv", "key/value heads")):
        rows.append([f"{label} per block", *change(before["blocks"][0][key], after["blocks"][0][key])])
    heads = [side["blocks"][0]["kv"] * side["blocks"][0]["group"] for side in (before, after)]
    rows.append(["query heads per block", *change(*heads)])
    rows.append(["tied embeddings", before["tied"], after["tied"], "-"])
    return table(["size", "before", "after", "kept"], rows)


def _counts_table(achieved: dict[str, int]) -> str:
    labels = {
        "params": "parameters",
        "bytes": "bytes of weight files",
        "flops_per_token": "FLOPs per token",
        "kv_bytes_per_token": "key/value cache bytes per token",
    }
    rows = [[label, *change(achieved[f"{key}_before"], achieved[key])] for key, label in labels.items()]
    return table(["measure", "before", "after", "kept"], rows)


def _request(record: dict[str, Any]) -> str:
    asked = record["requested"]
    options = {key: value for key, value in asked["options"].items() if value is not None}
    wanted = (
        f"ratio {asked['ratio']}" if asked["ratio"] is not None else ", ".join(asked["target"]) or "the method's knob"
    )
    shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
    return f"`{record['method']}`, {wanted}, options: {shown}, seed {asked['seed']}"


def write_card(folder: Path, record: dict[str, Any], achieved: dict[str, int]) -> None:
    """The model card: only what the same request gives again, byte for byte."""
    loads = table(["runtime", "loads"], [[name, state] for name, state in record["loads_in"].items()])
    origin = (
        "\n\nThe card of the model it was made from is in `README.source.md`."
        if (folder / "README.source.md").is_file()
        else ""
    )
    share = 1 - achieved["params"] / achieved["params_before"]
    text = f"""---
library_name: transformers
tags: [pruned, secateur]
---

# Pruned with Secateur {record["secateur"]}

Request: {_request(record)}. {share:.2%} of all parameters are gone, counted from the file.

{_counts_table(achieved)}

{_sizes_table(record)}

Loads with plain `transformers`:

    AutoModelForCausalLM.from_pretrained("{folder.name if folder.name != "out" else "."}")

{loads}

`secateur.json` holds the request, the sizes and the SHA-256 of every tensor.{origin}
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def write_report(
    folder: Path,
    record: dict[str, Any],
    achieved: dict[str, int],
    perplexity: dict[str, Any] | None,
    speed: tuple[Figures, Figures] | None,
    run: dict[str, str],
) -> None:
    """The report of a run, its measured times included.

    Args:
        speed: figures of ``evaluate_models`` for the dense and the pruned model.
        run: how the run went: seconds, peak memory, device, ...
    """
    parts = [
        f"# Secateur report\n\nRequest: {_request(record)}.",
        "## Sizes",
        _counts_table(achieved),
        _sizes_table(record),
    ]
    quality = []
    if perplexity is not None:
        cells = change(perplexity["before"], perplexity["after"], ".3f")
        what = f"perplexity ({perplexity['tokens']:,} tokens, windows of {perplexity['context']})"
        quality.append([what, *cells])
    if speed is not None:
        for key, label in (
            ("prefill_tokens_per_second", "prefill tokens/s"),
            ("decode_tokens_per_second", "decode tokens/s"),
        ):
            quality.append([label, *change(speed[0][key], speed[1][key], ",.1f")])
    if quality:
        parts += ["## Quality and speed", table(["measure", "before", "after", "ratio"], quality)]
    if record["notes"]:
        parts += ["## What the method notes", table(["note", "value"], [[k, v] for k, v in record["notes"].items()])]
    parts += ["## Run", table(["what", "value"], [[key, value] for key, value in run.items()])]
    data = record["data"]
    hashes = [["plan", record["plan_sha256"]]]
    if data is not None:
        hashes.insert(0, [f"calibration text ({data['windows']} windows of {data['length']} tokens)", data["sha256"]])
    parts += ["## Hashes (SHA-256)", table(["of", "value"], hashes)]
    parts += ["Those of every tensor are in `secateur.json`."]
    for key, title in (("passthrough", "Tensors that only travel along"), ("left_behind", "Files left behind")):
        if record[key]:
            parts += [f"## {title}", "\n".join(f"* `{name}`" for name in record[key])]
    (folder / REPORT).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
