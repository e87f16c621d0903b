"""Tables of the documentation that are generated from the code: ``python -m secateur.reports.documentation``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.families import LAYOUTS, Architecture, family_names
from secateur.families.limits import verdict
from secateur.families.loading import loads_by_kind
from secateur.families.stock import example_config
from secateur.methods.registry import describe_method, describe_options, method_names
from secateur.reports.markdown import table
from secateur.spaces import KINDS
from secateur.training.options import Training


def methods_table() -> str:
    """All methods, one line each, linked to their pages."""
    rows = []
    for name in method_names():
        facts = describe_method(name)
        paper = facts["paper"]
        link = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper else "-"
        rows.append([f"[`{name}`](docs/methods/{name}.md)", facts["title"], link, facts["data"], facts["output"]])
    return table(["method", "title", "paper", "data", "output"], rows)


def options_table(name: str) -> str:
    """Options of a method with their defaults."""
    facts = describe_method(name)
    return _options_rows(facts["options"]) + f"\n\nOutput: {facts['output']}, {facts['worth']}."


def training_table() -> str:
    """Options of ``recover`` with their defaults."""
    return _options_rows(describe_options(Training))


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
        architecture = Architecture(example_config(name))
        rows += [[name, kind, layout, *verdict(architecture, kind, layout)] for kind in KINDS for layout in LAYOUTS]
    return table(["family", "space", "layout", "cut", "why, or what the sizes must satisfy"], rows)


def loads_table() -> str:
    """Where a pruned model of each family loads, by what was cut."""
    rows = []
    for name in family_names():
        for runtime, stated in loads_by_kind(Architecture(example_config(name))).items():
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
    }
    for name in method_names():
        page = root / "docs" / "methods" / f"{name}.md"
        if page.is_file():
            found[page] = {"options": lambda name=name: options_table(name)}  # type: ignore[misc]
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
