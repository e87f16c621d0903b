"""What a person sees: progress on standard error, tables on standard output."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from secateur.meters.memory import anonymous_bytes

out = Console()
_SECONDS_BETWEEN_LINES = 5.0


class ConsoleProgress:
    """A bar with block, sweep, time left and memory on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[memory]}"),
                console=console,
            )
        self._task: TaskID | None = None
        self._what, self._total, self._peak, self._said, self._started = "", 0, 0, 0.0, 0.0

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, what: str, total: int) -> None:
        self._what, self._total, self._started, self._said = what, total, time.monotonic(), 0.0
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total, memory="")

    def step(self, done: int) -> None:
        self._peak = max(self._peak, anonymous_bytes())
        memory = f"peak {self._peak / 2**20:,.0f} MiB"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, memory=memory)
            return
        now = time.monotonic()
        if done >= self._total or now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            spent = now - self._started
            left = spent / done * (self._total - done) if done else 0.0
            line = f"{self._what} {done}/{self._total}, {spent:.0f} s, {left:.0f} s left, {memory}"
            print(line, file=sys.stderr, flush=True)

    def note(self, message: str) -> None:
        console = self._bar.console if self._bar is not None else Console(stderr=True)
        console.print(message, highlight=False, markup=False)


def new_table(*head: str, numbers: bool = True) -> Table:
    """A table whose columns after the first hold numbers, or text."""
    table = Table(box=None, header_style="bold")
    for position, name in enumerate(head):
        table.add_column(name, justify="right" if numbers and position else "left", overflow="fold")
    return table


def count_table(achieved: dict[str, Any]) -> Table:
    table = new_table("", "before", "after", "kept")
    for key, label in (
        ("params", "parameters"),
        ("nonzero", "not zero"),
        ("factored_params", "parameters as factors"),
        ("bytes", "bytes"),
        ("factored_bytes", "bytes as factors"),
        ("flops_per_token", "FLOPs per token"),
        ("flops", "FLOPs of one run"),
        ("kv_bytes_per_token", "KV bytes per token"),
    ):
        if key in achieved:
            before, after = achieved[f"{key}_before"], achieved[key]
            table.add_row(label, f"{before:,}", f"{after:,}", f"{after / before:.2%}" if before else "-")
    return table


def show_prune(result: dict[str, Any]) -> None:
    out.print(count_table(result["achieved"]))
    if "packed" in result:
        out.print(_forms(result["packed"]))
    if "spearman" in result:
        out.print("Spearman {before:.4f} -> {after:.4f} ({pairs:,} scored pairs)".format(**result["spearman"]))
    figures = result["perplexity"]
    if figures is not None:
        out.print(
            f"perplexity {figures['before']:.3f} -> {figures['after']:.3f} "
            f"({figures['tokens']:,} tokens, windows of {figures['context']})"
        )
    _show_end(result)


def show_recover(result: dict[str, Any]) -> None:
    training, figures = result["training"], result["perplexity"]
    out.print(
        f"{training['steps']} steps, {training['tokens']:,} tokens; "
        f"{training['trainable_params']:,} parameters trained; step {training['kept_step']} kept"
    )
    held_back = training["validation"]
    if held_back["before"] is not None:
        out.print(f"held-back cross entropy {held_back['before']:.4f} -> {held_back['after']:.4f} nats per token")
    if figures is not None:
        teacher = "" if figures["teacher"] is None else f", teacher {figures['teacher']:.3f}"
        out.print(
            f"perplexity {figures['before']:.3f} -> {figures['after']:.3f}{teacher} "
            f"({figures['tokens']:,} tokens, windows of {figures['context']})"
        )
    _show_end(result)


def _show_end(result: dict[str, Any]) -> None:
    loads = ", ".join(f"{name} {state}" for name, state in result["loads_in"].items())
    out.print(f"{result['seconds']:.1f} s, peak {result['peak_rss_bytes'] / 2**20:,.0f} MiB; loads in: {loads}")
    out.print(f"written to {result['output']}", highlight=False)


def show_preview(result: dict[str, Any]) -> None:
    if "sizes" in result:
        out.print(f"method {result['method']}, output {result['output_kind']}", highlight=False)
        table = new_table("size", "before", "after")
        for kind, change in result["sizes"].items():
            table.add_row(kind, str(change["before"]), str(change["after"]))
        out.print(table)
        out.print(count_table(result["achieved"]))
        if not result["foreseen"]:
            out.print("these are the sizes of an even cut: which blocks give how much is known only at the run")
        if result["untied"]:
            out.print(
                f"the head must be untied from the embedding: {result['untied']:,} parameters more, counted above"
            )
            out.print("(--set tie=keep, where the method has it, keeps one table by least squares instead)")
        if result["kept_tied"]:
            out.print(f"the head stays tied to the embedding; untying it would add {result['kept_tied']:,} parameters")
        if result["needs_data"]:
            out.print("this method needs calibration text (--data) to run")
        time = "" if result["seconds"] is None else f", time {result['seconds']:,.0f} s on this machine now"
        peak = f"estimated peak memory {result['peak_bytes'] / 2**20:,.0f} MiB{time}"
        out.print(f"gap to the target {result['gap']:+.3%}; {peak}")
    for problem in result["problems"]:
        hint = f" {problem['hint']}." if problem["hint"] else ""
        out.print(f"problem: {problem['asked']}: {problem['found']}.{hint}", markup=False, highlight=False)


def show_evaluate(result: dict[str, Any]) -> None:
    against, ratio = result.get("against"), result.get("ratio")
    table = new_table("", "model", *(["against", "ratio"] if against else []))
    columns = [_rows(side) for side in (result, against, ratio) if side]
    for label, value in columns[0].items():
        table.add_row(escape(label), _number(value), *(_number(column.get(label)) for column in columns[1:]))
    out.print(table)


def _rows(figures: dict[str, Any]) -> dict[str, float | None]:
    """Figures by label, those of each text and task after the others."""
    found = {k.replace("_", " "): v for k, v in figures.items() if k not in ("against", "ratio", "texts", "tasks")}
    for group in ("texts", "tasks"):
        for name, values in figures.get(group, {}).items():
            found.update({f"{name}: {key}": value for key, value in values.items()})
    return found


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def show_compare(result: dict[str, Any]) -> None:
    dense, quality = result["dense"], result["dense"]["perplexity"]
    out.print(f"dense: {dense['params']:,} parameters, perplexity {_number(quality)}", highlight=False)
    table = new_table("method", "layout", "ratio", "removed", "perplexity", "seconds", "decode", "MiB")
    for line in result["summary"]:
        cells = ["not reachable" if line["state"] == "unreachable" else "failed", "-", "-", "-", "-"]
        if line["state"] == "done":
            faster, peak = line["decode"]["ratio"], line["peak_rss_bytes"] / 2**20
            cells = [f"{line['removed']:.1%}", _number(line["perplexity"]["mean"]), f"{line['seconds']:.1f}"]
            cells += ["-" if faster is None else f"{faster:.2f}x", f"{peak:,.0f}"]
        table.add_row(escape(line["method"]), line["layout"], f"{line['ratio']:g}", *cells)
    out.print(table)
    winners = new_table("ratio", "layout", "parameters", "best at that size", "perplexity", "not better than random")
    for verdict in result["judgement"]:
        found, best = verdict["methods"], verdict["best"]
        worse = ", ".join(name for name in found if found[name]["better_than_random"] is False)
        figures = ["-", "-"] if best is None else [best, _number(found[best]["perplexity"])]
        cells = [verdict["layout"], f"{verdict['params']:,.0f}", *figures, worse or "-"]
        winners.add_row(f"{verdict['ratio']:g}", *map(escape, cells))
    out.print(winners)
    out.print(f"report: {result['page']}, {result['report']}", highlight=False, markup=False)


def show_export(result: dict[str, Any]) -> None:
    check = result["check"]
    if check:
        ran = f"{check['runtime']} ({check['version']}): {check['generated_tokens']} greedy tokens equal, logits of"
        difference = f"{check['prompt_tokens']} tokens within {check['logits_difference']:.1e} of the largest"
        out.print(f"{ran} {difference}", highlight=False)
    loads = ", ".join(f"{name} {state}" for name, state in result["loads_in"].items())
    out.print(f"{result['bytes']:,} bytes, {result['dtype']}, {result['seconds']:.1f} s; {loads}", highlight=False)
    out.print(f"written to {result['output']}", highlight=False, markup=False)


def show_pack(result: dict[str, Any]) -> None:
    table = new_table("", "bytes")
    for key in ("folder_bytes", "square_bytes", "triangular_bytes", "tensor_bytes", "files_bytes", "header_bytes"):
        table.add_row(_PACKED[key], f"{result[key]:,}")
    table.add_row("the archive", f"{result['bytes']:,}")
    out.print(table)
    bits, angles, saving = result["bits"], result["angles"], result["saving"]
    out.print(
        f"{bits['returned'] / 8:,.0f} bytes returned by {angles['coded']:,} of {angles['free']:,} angles, less "
        f"{bits['corrections'] / 8:,.0f} for corrections, {bits['signs'] / 8:,.0f} for signs, "
        f"{bits['table'] / 8:,.0f} for precisions: {bits['net'] / 8:,.0f}",
        highlight=False,
    )
    out.print(
        f"saved {saving['of_square']:.2%} of the tensors with square shortcuts, {saving['of_triangular']:.2%} with "
        f"triangular ones, {saving['of_folder']:.2%} of the folder",
        highlight=False,
    )
    if result["check"]:
        out.print(f"logits within {result['check']['logits_difference']:.1e} of the largest", highlight=False)
    out.print(f"{result['seconds']:.1f} s, written to {result['output']}", highlight=False, markup=False)


_PACKED = {
    "folder_bytes": "the folder",
    "square_bytes": "its tensors, with square shortcuts",
    "triangular_bytes": "its tensors, with triangular shortcuts",
    "tensor_bytes": "tensors in the archive",
    "files_bytes": "other files in the archive",
    "header_bytes": "header of the archive",
}


def show_packed(result: dict[str, Any]) -> None:
    out.print(_forms(result["packed"]))
    out.print(f"{result['seconds']:.1f} s, written to {result['output']}", highlight=False, markup=False)


def _forms(packed: dict[str, Any]) -> Table:
    """Bytes by the kind of storage, beside the dense ones and the bound."""
    table = new_table("stored as", "tensors", "bytes", "dense bytes", "bound")
    for form, facts in packed["forms"].items():
        table.add_row(form, *(f"{facts[key]:,}" for key in ("tensors", "bytes", "dense_bytes", "bound_bytes")))
    tensors = sum(facts["tensors"] for facts in packed["forms"].values())
    numbers = (tensors, packed["bytes"], packed["dense_bytes"], packed["bound_bytes"])
    table.add_row("files", *(f"{number:,}" for number in numbers))
    return table


def show_unpack(result: dict[str, Any]) -> None:
    out.print(f"{result['tensors']:,} tensors, {result['bytes']:,} bytes, {result['seconds']:.1f} s", highlight=False)
    out.print(f"written to {result['output']}", highlight=False, markup=False)


def show_delta_pack(result: dict[str, Any]) -> None:
    table = new_table("", "bytes")
    for key in ("tuned_bytes", "values_bytes", "index_bytes", "bound_bytes", "whole_bytes", "files_bytes"):
        table.add_row(_DELTA[key], f"{result[key]:,}")
    table.add_row("header of the file", f"{result['header_bytes']:,}")
    table.add_row("the file", f"{result['bytes']:,}")
    out.print(table)
    tensors, q = result["tensors"], result["q"]
    divided = "" if q is None else f", divided by {q['smallest']:.4g} to {q['largest']:.4g}"
    out.print(
        f"{result['method']}: {result['kept']:,} of {result['entries']:,} entries kept{divided}; {tensors['pruned']} "
        f"tensors pruned, {tensors['whole']} whole, {tensors['unchanged']} as in the base",
        highlight=False,
    )
    beside = "" if result["adapter_bytes"] is None else f" (an adapter of {result['adapter_bytes']:,} bytes)"
    share = result["bytes"] / result["tuned_bytes"]
    out.print(f"{share:.2%} of the fine-tune's weights{beside}, {result['seconds']:.1f} s", highlight=False)
    out.print(f"written to {result['output']}", highlight=False, markup=False)


_DELTA = {
    "tuned_bytes": "the fine-tune's weights",
    "values_bytes": "kept values",
    "index_bytes": "which they are",
    "bound_bytes": "both at least, were they arbitrary",
    "whole_bytes": "tensors that are not pruned",
    "files_bytes": "other files",
}


def show_delta_apply(result: dict[str, Any]) -> None:
    out.print(f"{result['tensors']:,} tensors, {result['bytes']:,} bytes, {result['seconds']:.1f} s", highlight=False)
    out.print(f"written to {result['output']}", highlight=False, markup=False)


def show_methods(result: dict[str, Any]) -> None:
    table = new_table("method", "title", "data", "output", "paper", numbers=False)
    for name, facts in result.items():
        table.add_row(name, facts["title"], facts["data"], facts["output"], facts["paper"])
    out.print(table)
    if len(result) == 1:
        ((_, facts),) = result.items()
        out.print(f"output: {facts['worth']}", highlight=False)
        _show_options(facts["options"])
        for option, variant in facts["variants"].items():
            out.print(f"with --set {option}: {variant['worth']}", highlight=False)
            _show_options(variant["options"])


def _show_options(options: dict[str, Any]) -> None:
    table = new_table("--set", "values", "default", "what", numbers=False)
    for key, option in options.items():
        values = "|".join(map(str, option["choices"])) if option["choices"] else option["type"]
        table.add_row(key, values, str(option["default"]), escape(option["description"]))
    out.print(table)


def show_families(result: dict[str, Any]) -> None:
    table, notes = new_table("family", "space", "native layout", "per-layer layout", numbers=False), _Notes()
    for name, facts in result.items():
        for kind, state in facts["native"].items():
            table.add_row(name, kind, notes.mark(state), notes.mark(facts["per-layer"][kind]))
    out.print(table)
    notes.print()


class _Notes:
    """Reasons of verdicts, told once each below the table they belong to."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, verdict: str) -> str:
        """``refused (why)`` as ``refused [n]``."""
        state, _, why = verdict.partition(" (")
        if not why:
            return state
        number = self._numbers.setdefault(why.removesuffix(")"), len(self._numbers) + 1)
        return escape(f"{state} [{number}]")

    def print(self) -> None:
        for why, number in self._numbers.items():
            out.print(escape(f"[{number}] {why}"), highlight=False)


def show_inspect(result: dict[str, Any]) -> None:
    for key in ("model_type", "params", "bytes", "flops_per_token", "kv_bytes_per_token", "dtypes", "tied", "context"):
        value = result[key]
        shown = f"{value:,}" if type(value) is int else str(value)
        out.print(f"{key.replace('_', ' ')}: {shown}", highlight=False)
    shortcuts = result.get("shortcuts")
    if shortcuts:
        out.print(
            f"shortcuts: {shortcuts['shortcuts']} triangles of width {shortcuts['width']}, {shortcuts['stored']:,} "
            f"numbers; squares would be {shortcuts['square']:,}",
            highlight=False,
        )
    head = ("space", "units", "spaces", "params of a unit", "share of params", "native layout", "per-layer layout")
    table, notes = new_table(*head, numbers=False), _Notes()
    for kind, facts in result["spaces"].items():
        cells = [str(facts["units"]), str(facts["count"]), f"{facts['params_per_unit']:,}", f"{facts['share']:.1%}"]
        table.add_row(kind, *cells, notes.mark(facts["native"]), notes.mark(facts["per-layer"]))
    out.print(table)
    notes.print()
    if "family_file" in result:
        out.print(f"family file: {result['family_file']}", highlight=False)


def show_demo(result: dict[str, Any]) -> None:
    table = new_table("method", "ratio", "params", "removed", "perplexity", "seconds")
    table.add_row("dense", "0", f"{result['dense']['params']:,}", "0.0%", f"{result['dense']['perplexity']:.2f}", "-")
    for row in result["rows"]:
        removed = 1 - row["params"] / result["dense"]["params"]
        cells = [f"{row['params']:,}", f"{removed:.1%}", f"{row['perplexity']:.2f}", f"{row['seconds']:.1f}"]
        table.add_row(row["method"], str(row["ratio"]), *cells)
    out.print(table)
    out.print(f"report: {result['page']}, {result['report']}", highlight=False)
