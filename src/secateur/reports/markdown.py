"""Plain Markdown pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def change(before: float | None, after: float | None, form: str = ",.0f") -> list[str]:
    """Cells: before, after, ratio."""
    if before is None or after is None:
        return ["-", "-", "-"]
    return [format(before, form), format(after, form), f"{after / before:.1%}" if before else "-"]
