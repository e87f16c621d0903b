"""What the README and the documentation say is true today."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from conftest import Checkpoints
from secateur.cli import main
from secateur.methods.registry import method_names
from secateur.reports.documentation import regenerate, sections

ROOT = Path(__file__).resolve().parents[1]


def shell_commands() -> list[str]:
    """The ``secateur`` commands of the section on use, comments removed."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Use it")[1].split("## ")[0]
    lines = [line.strip().split("#")[0] for line in section.splitlines() if line.startswith("    secateur ")]
    return [command.strip() for line in lines for command in line.split(";")]


def test_the_commands_of_the_readme_run(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    shutil.copy(notes, tmp_path / "notes.txt")
    shutil.copy(held_out, tmp_path / "heldout.txt")
    monkeypatch.chdir(tmp_path)
    commands = shell_commands()
    assert len(commands) >= 7
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            main(shlex.split(command)[1:])
        assert stopped.value.code == 0, command
    assert (tmp_path / "small" / "model.safetensors").is_file()
    assert (tmp_path / "small2" / "secateur-report.md").is_file()


def test_generated_sections_are_current() -> None:
    for path, makers in sections(ROOT).items():
        text = path.read_text(encoding="utf-8")
        assert regenerate(text, makers) == text, f"run: python -m secateur.reports.documentation ({path.name})"


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_page(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert "## Options" in page
    assert "## Measured" in page


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
