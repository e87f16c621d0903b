"""Tables of the documentation that are generated from the code: ``python -m secateur.reports.documentation``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from secateur.deltas.options import METHODS, DeltaMethod, Searched
from secateur.families import LAYOUTS, Architecture, family_names
from secateur.families.limits import verdict
from secateur.families.loading import loads_by_kind
from secateur.methods.registry import (
    checkpoint_methods,
    describe_method,
    describe_options,
    method_class,
    method_names,
    module_class,
)
from secateur.reports.markdown import table
from secateur.spaces import KINDS
from secateur.training.options import Training


def methods_table() -> str:
    """All methods, one line each, linked to their pages."""
    rows = []
    for name in method_names():
        facts = describe_method(name)
        paper = facts["paper"]
        number = paper.removeprefix("arXiv:")
        link = f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper or "-"
        rows.append([f"[`{name}`](docs/methods/{name}.md)", facts["title"], link, facts["data"], facts["output"]])
    return table(["method", "title", "paper", "data", "output"], rows)


def options_table(name: str) -> str:
    """Options of a method with their defaults."""
    facts = describe_method(name)
    tables = [_options_rows(facts["options"]) + f"\n\nOutput: {facts['output']}, {facts['worth']}."]
    for option, variant in facts["variants"].items():
        output = f"Output: {variant['output']}, {variant['worth']}."
        tables.append(f"With `{option}`:\n\n{_options_rows(variant['options'])}\n\n{output}")
    return "\n\n".join(tables)


def module_options_table(name: str) -> str:
    """Options of a method for checkpoints where it prunes a module."""
    return _options_rows(describe_options(module_class(name)))


def compared_table(name: str, results: Path) -> str:
    """What ``compare`` found about a method on every model, at equal size, beside random and the best other one.

    Args:
        name: of the method.
        results: folder of folders with a ``results.json`` each.
    """
    rows: list[list[str]] = []
    ratios: dict[float, None] = {}
    for file in sorted(results.glob("*/results.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        mine = [each["label"] for each in found["methods"] if each["method"] == name]
        model = (
            f"[{file.parent.name}](../results/{file.parent.name}/README.md), {found['dense']['perplexity']:.2f} dense"
        )
        for layout in dict.fromkeys(judged["layout"] for judged in found["judgement"]):
            here = [judged for judged in found["judgement"] if judged["layout"] == layout]
            labels = [label for label in mine if any(judged["methods"][label]["perplexity"] for judged in here)]
            shown = [[label, *(_at_equal_size(judged, label) for judged in here)] for label in labels]
            if labels and (baseline := found["baseline"]) not in mine:
                shown.append([baseline, *(_at_equal_size(judged, baseline) for judged in here)])
            if labels:
                shown.append(["best other", *(_best_other(judged, mine) for judged in here)])
                ratios |= dict.fromkeys(judged["ratio"] for judged in here)
            for row in shown:
                rows.append([model, layout, *row])
                model = layout = ""
    return table(["model", "layout", "what", *(f"{ratio:g}" for ratio in ratios)], rows) if rows else "None yet."


def _at_equal_size(judged: dict[str, Any], label: str) -> str:
    figures = judged["methods"][label]
    return "-" if figures["perplexity"] is None else f"{'~' * figures['beyond']}{figures['perplexity']:.2f}"


def _best_other(judged: dict[str, Any], mine: Sequence[str]) -> str:
    others = {label: f["perplexity"] for label, f in judged["methods"].items() if label not in mine and f["perplexity"]}
    best = min(others, key=others.__getitem__, default=None)
    return "-" if best is None else f"{_at_equal_size(judged, best)} {best}"


def training_table() -> str:
    """Options of ``recover`` with their defaults."""
    return _options_rows(describe_options(Training))


def delta_table() -> str:
    """Options of ``delta pack``: those of all methods, then those of each."""
    rows: list[list[str]] = []
    groups: dict[str, type[BaseModel]] = {"all": DeltaMethod, "all but dare": Searched}
    told: set[str] = set()
    for name, schema in {**groups, **METHODS}.items():
        new = {key: option for key, option in describe_options(schema).items() if key not in told}
        for key, option in new.items():
            values = " \\| ".join(map(str, option["choices"])) if option["choices"] else option["type"]
            rows.append([name, f"`{key}`", values, str(option["default"]), option["description"]])
        told |= set(new) if name in groups else set()
    return table(["method", "`--set`", "values", "default", "what"], rows)


def _options_rows(options: dict[str, Any]) -> str:
    rows = []
    for key, option in options.items():
        values = " \\| ".join(map(str, option["choices"])) if option["choices"] else option["type"]
        rows.append([f"`{key}`", values, option["default"], option["description"]])
    return table(["`--set`", "values", "default", "what"], rows)


def families_table() -> str:
    """What can be cut where: family x space x layout."""
    rows = []
    for name in family_names():
        architecture = Architecture.example(name)
        kinds = [kind for kind in KINDS if architecture.sizes.size(kind)]
        rows += [[name, kind, layout, *verdict(architecture, kind, layout)] for kind in kinds for layout in LAYOUTS]
    return table(["family", "space", "layout", "cut", "why, or what the sizes must satisfy"], rows)


def loads_table() -> str:
    """Where a pruned model of each family loads, by what was cut."""
    rows = []
    for name in family_names():
        for runtime, stated in loads_by_kind(Architecture.example(name)).items():
            states = dict.fromkeys(stated.values())
            rows += [[name, runtime, ", ".join(k for k in stated if stated[k] == state), state] for state in states]
    return table(["family", "runtime", "cut", "loads"], rows)


def sections(root: Path) -> dict[Path, dict[str, Callable[[], str]]]:
    """Generated sections by file and marker."""
    found: dict[Path, dict[str, Callable[[], str]]] = {
        root / "README.md": {"methods": methods_table},
        root / "docs" / "families.md": {"families": families_table},
        root / "docs" / "deploy.md": {"loads": loads_table},
        root / "docs" / "recover.md": {"options": training_table},
        root / "docs" / "methods" / "darex.md": {"options": delta_table},
    }
    compared = checkpoint_methods()
    for name in method_names():
        page = root / "docs" / "methods" / f"{name}.md"
        if page.is_file():
            found[page] = {"options": partial(options_table, name)}
            if module_class(name) is not method_class(name):
                found[page]["modules"] = partial(module_options_table, name)
            if name in compared:
                found[page]["compared"] = partial(compared_table, name, root / "docs" / "results")
    return found


def regenerate(text: str, makers: dict[str, Callable[[], str]]) -> str:
    """``text`` with the content between its ``<!-- NAME -->`` and ``<!-- /NAME -->`` markers made anew."""
    for name, make in makers.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        content = make()
        text, count = pattern.subn(lambda m, content=content: f"{m[1]}{content}\n{m[2]}", text)  # type: ignore[misc]
        if not count:
            raise ValueError(f"no marker for section {name!r}")
    return text


def main() -> None:
    """Rewrite every generated section of the checkout in the working directory."""
    for path, makers in sections(Path.cwd()).items():
        old = path.read_text(encoding="utf-8")
        new = regenerate(old, makers)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"rewrote {path}")


if __name__ == "__main__":
    main()
