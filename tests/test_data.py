"""Calibration text from every source, and the draw of its windows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

import models
import secateur
from conftest import Checkpoints
from secateur.data.sources import documents
from secateur.data.windows import Windows, calibration_windows
from secateur.errors import RequestError

TEXTS = [models.text(40, seed) for seed in range(3)]


def draw(
    source: Path | str, folder: Path, samples: int = 4, length: int = 16, seed: int = 0, field: str = "text"
) -> Windows:
    """Windows for a tiny model."""
    return calibration_windows(str(source), folder, models.VOCABULARY, samples, length, seed, field)


@pytest.fixture
def stream() -> np.ndarray:
    """Token ids of all texts, each with its special tokens."""
    tokenizer = models.tokenizer()
    return np.concatenate([tokenizer(text)["input_ids"] for text in TEXTS])


def sources(folder: Path) -> dict[str, tuple[Path, str]]:
    """The same three documents in every form."""
    (folder / "many").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "many" / f"{number}.txt").write_text(text)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n\n" for t in TEXTS))
    (folder / "body.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    parquet.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), folder / "table.parquet")
    parquet.write_table(pa.table({"body": TEXTS}), folder / "body.parquet")
    ids = np.concatenate([models.tokenizer()(text)["input_ids"] for text in TEXTS])
    np.save(folder / "ids.npy", ids.astype(np.int32))
    return {
        "folder": (folder / "many", "text"),
        "jsonl": (folder / "lines.jsonl", "text"),
        "jsonl-field": (folder / "body.jsonl", "body"),
        "parquet": (folder / "table.parquet", "text"),
        "parquet-field": (folder / "body.parquet", "body"),
        "npy": (folder / "ids.npy", "text"),
    }


@pytest.mark.parametrize("form", ["folder", "jsonl", "jsonl-field", "parquet", "parquet-field", "npy"])
def test_every_form_gives_the_same_windows(
    form: str, checkpoint: Checkpoints, tmp_path: Path, stream: np.ndarray
) -> None:
    path, field = sources(tmp_path)[form]
    found = draw(path, checkpoint(), samples=10_000, field=field)
    count = len(stream) // 16
    assert found.record()["windows"] == count
    assert torch.equal(found.ids, torch.from_numpy(stream[: count * 16].reshape(count, 16)))


def test_whole_text_file_is_one_document(checkpoint: Checkpoints, notes: Path) -> None:
    found = draw(notes, checkpoint(), samples=10_000).ids.flatten()
    wanted = models.tokenizer()(notes.read_text())["input_ids"]
    assert found.tolist() == wanted[: len(found)]


def test_standard_input(checkpoint: Checkpoints, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(notes.read_text()))
    piped = draw("-", checkpoint())
    assert torch.equal(piped.ids, draw(notes, checkpoint()).ids)
    assert piped.digest == draw(notes, checkpoint()).digest


def test_chat_goes_through_the_template(checkpoint: Checkpoints, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "prune the hedge"}, {"role": "assistant", "content": "the hedge is pruned now"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    found = draw(tmp_path / "chat.jsonl", checkpoint(), samples=1000, length=4).ids.flatten()
    shown = "".join(f"<s>{m['role']}: {m['content']}</s>" for m in chat)
    wanted = models.tokenizer()(shown, add_special_tokens=False)["input_ids"]
    assert found.tolist() == wanted[: len(found)]
    assert len(found) > len(wanted) - 4


def test_chat_without_template_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    with pytest.raises(RequestError, match="chat template"):
        draw(tmp_path / "chat.jsonl", folder)


def test_windows_are_drawn_without_overlap(checkpoint: Checkpoints, notes: Path) -> None:
    """Seeded, sorted, each once; another seed draws others."""
    every = draw(notes, checkpoint(), samples=10_000).ids
    places = {tuple(row): index for index, row in enumerate(every.tolist())}
    drawn = {seed: draw(notes, checkpoint(), samples=12, seed=seed).ids for seed in (0, 1)}
    for ids in drawn.values():
        assert ids.shape == (12, 16)
        assert all(tuple(row) in places for row in ids.tolist())
    again = draw(notes, checkpoint(), samples=12, seed=0).ids
    assert torch.equal(drawn[0], again)
    assert not torch.equal(drawn[0], drawn[1])


def test_each_window_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(290))
    first = draw(tmp_path / "ids.npy", checkpoint(), samples=12, length=16).ids[:, 0]
    assert len(set(first.tolist())) == 12
    assert first.tolist() == sorted(first.tolist())
    assert all(value % 16 == 0 for value in first.tolist())


def test_count_and_hash_are_recorded(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Fewer windows than asked are recorded; the hash is that of the content."""
    (tmp_path / "few.txt").write_text(models.text(10))
    secateur.prune(
        checkpoint(),
        method="slicegpt",
        ratio=0.15,
        data=tmp_path / "few.txt",
        samples=500,
        length=16,
        output=tmp_path / "out",
    )
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())["data"]
    tokens = len(models.tokenizer()(models.text(10))["input_ids"])
    assert record["windows"] == tokens // 16 < 500
    assert record["length"] == 16
    (tmp_path / "same.txt").write_text(models.text(10))
    (tmp_path / "other.txt").write_text(models.text(11))
    assert draw(tmp_path / "same.txt", checkpoint()).digest == record["sha256"]
    assert draw(tmp_path / "other.txt", checkpoint()).digest != record["sha256"]


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.jsonl", "ignored.csv"):
        (tmp_path / name).write_text('{"text": "c"}' if name == "c.jsonl" else name[0])
    assert list(documents(str(tmp_path))) == ["a", "b", "c"]
