"""What a person sees of networks that are no checkpoints: their spaces, and what was not cut and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.markup import escape

from secateur.cli.console import count_table, new_table, out, show_preview, show_prune


def show_network_prune(result: dict[str, Any]) -> None:
    show_prune(result)
    _show_refused(result)


def show_network_preview(result: dict[str, Any]) -> None:
    out.print(f"method {result['method']}", highlight=False)
    sizes = new_table("space", "before", "after")
    for name, change in result["sizes"].items():
        sizes.add_row(escape(name), str(change["before"]), str(change["after"]))
    out.print(sizes)
    out.print(count_table(result["achieved"]))
    _show_refused(result)
    show_preview({"problems": result["problems"]})


def _show_refused(result: dict[str, Any]) -> None:
    """Reasons with the number of spaces they hold for, and operators without a rule."""
    for reason, count in Counter(result["refused"].values()).most_common():
        what = next(name for name, why in result["refused"].items() if why == reason)
        more = f" and {count - 1} more" if count > 1 else ""
        out.print(f"not cut: {what}{more}: {reason}", markup=False, highlight=False)
    _show_unknown(result.get("unknown", {}))


def _show_unknown(unknown: dict[str, int]) -> None:
    if unknown:
        told = ", ".join(f"{name} ({count})" for name, count in unknown.items())
        out.print(f"operators without a rule, whose tensors stay: {told}", markup=False, highlight=False)


def show_network(result: dict[str, Any]) -> None:
    for key in ("format", "producer", "opset", "params", "bytes", "flops"):
        value = result[key]
        out.print(f"{key}: {f'{value:,}' if type(value) is int else value}", highlight=False, markup=False)
    for name, facts in result["inputs"].items():
        shape = ", ".join(map(str, facts["shape"]))
        out.print(f"input: {name} {facts['type']} [{shape}]", highlight=False, markup=False)
    operators = ", ".join(f"{name} {count}" for name, count in result["operators"].items())
    out.print(f"operators: {operators}", highlight=False, markup=False)
    if "drawing" in result:
        out.print(f"drawn: {result['drawing']}", highlight=False, markup=False)
    if "spaces" not in result:
        return
    table = new_table("space", "units", "params", "share", "entries", "can be cut", numbers=False)
    for space in result["spaces"]:
        verdict = space.get("refused", "yes")
        if "refused" not in space and space["flags"]:
            verdict = f"with statistics=change ({space['flags'][0]})"
        cells = [str(space["size"]), f"{space['params']:,}", f"{space['share']:.1%}", str(len(space["entries"]))]
        table.add_row(escape(space["name"]), *cells, escape(verdict))
    out.print(table)
    out.print(f"{result['cuttable']:.1%} of the parameters lie in spaces that can be cut", highlight=False)
    _show_unknown(result["unknown"])
