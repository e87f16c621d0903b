"""``evaluate --tasks`` through lm-eval, offline: tasks from local files; and several texts at once."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
import secateur
from conftest import Checkpoints
from secateur.cli import main
from secateur.errors import RequestError

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval (extra eval) is not installed"
)
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: ""
target_delimiter: ""
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str, pairs: Path) -> Path:
    """A task file: is the good sentence of a pair more likely than the bad one?"""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(_TASK.format(name=name, data=pairs))
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and caches that vanish."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Sentences, whole and with two words in exchanged places."""
    path = tmp_path / "pairs.jsonl"
    rows = []
    for sentence in models.SENTENCES:
        words = sentence.split()
        for i in range(1, len(words) - 1):
            swapped = [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
            rows.append({"good": sentence, "bad": " ".join(swapped)})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@torch.no_grad()
def accuracy(folder: Path, rows: list[dict[str, str]]) -> float:
    """The definition: share of pairs whose good sentence has the higher log-likelihood after the start token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def likelihood(sentence: str) -> float:
        ids = torch.tensor([start, *tokenizer(sentence, add_special_tokens=False)["input_ids"]])
        scores = model(ids[None]).logits[0].float().log_softmax(-1)
        return float(scores[:-1].gather(1, ids[1:, None]).sum())

    return sum(likelihood(row["good"]) > likelihood(row["bad"]) for row in rows) / len(rows)


@needs_harness
@pytest.mark.usefixtures("offline")
class TestTasks:
    def test_task_file_against_another_model(self, checkpoint: Checkpoints, pairs: Path, tmp_path: Path) -> None:
        task = write_task(tmp_path / "tasks", "pairs_local", pairs)
        small = tmp_path / "small"
        secateur.prune(checkpoint(), method="random", ratio=0.3, output=small)
        found = secateur.evaluate(small, against=checkpoint(), tasks=[str(task)])
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        ours, theirs = found["tasks"]["pairs_local"], found["against"]["tasks"]["pairs_local"]
        assert ours["samples"] == theirs["samples"] == len(rows)
        assert 0 < ours["acc"] < 1
        assert ours["acc"] == pytest.approx(accuracy(small, rows))
        assert theirs["acc"] == pytest.approx(accuracy(checkpoint(), rows))
        assert found["ratio"]["tasks"]["pairs_local"]["acc"] == pytest.approx(ours["acc"] / theirs["acc"])

    def test_folder_of_tasks_in_the_command(
        self, checkpoint: Checkpoints, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("one_local", "two_local"):
            write_task(tmp_path / "tasks", name, pairs)
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", str(checkpoint()), "--tasks", str(tmp_path / "tasks"), "--json"])
        assert stopped.value.code == 0
        found = json.loads(capsys.readouterr().out)  # one object
        assert set(found["tasks"]) == {"one_local", "two_local"}
        assert found["tasks"]["one_local"] == found["tasks"]["two_local"]
        with pytest.raises(SystemExit):
            main(["evaluate", str(checkpoint()), "--tasks", str(tmp_path / "tasks" / "one_local.yaml")])
        assert "one_local: acc" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "code", "words"),
        [
            ("hellaswagg", "unknown-task", "did you mean hellaswag"),
            ("absent/task.yaml", "unknown-task", "no such file"),
            ("empty", "unknown-task", "holds no task file"),
            ("broken.yaml", "bad-task", "broken.yaml"),
        ],
    )
    def test_refusals(
        self, name: str, code: str, words: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "broken.yaml").write_text(_TASK.format(name="broken", data=tmp_path / "absent.jsonl"))
        with pytest.raises(RequestError) as caught:
            secateur.evaluate(checkpoint(), tasks=[name])
        assert (caught.value.exit_code, caught.value.code) == (2, code)
        assert words in str(caught.value)

    @pytest.mark.assets
    def test_blimp(self, assets: Path, tmp_path: Path) -> None:
        """Trained models tell good sentences from bad ones better than chance."""
        rows = [json.loads(line) for line in (assets / "tasks" / "blimp.jsonl").read_text().splitlines()]
        rows = rows[::20]
        (tmp_path / "blimp.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = write_task(tmp_path / "tasks", "blimp_part", tmp_path / "blimp.jsonl")
        model = assets / "lm" / "llama-docs-8m"
        found = secateur.evaluate(model, tasks=[str(task)])["tasks"]["blimp_part"]
        assert found["samples"] == len(rows)
        assert found["acc"] == pytest.approx(accuracy(model, rows), abs=2 / len(rows))  # ties of equal sentences
        assert found["acc"] > 0.5


def test_without_the_harness(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(RequestError, match=r"secateur\[eval\]") as caught:
        secateur.evaluate(checkpoint(), tasks=["hellaswag"])
    assert caught.value.code == "no-lm-eval"


# -- several texts ---------------------------------------------------------------------------------------------------

_KEYS = {"perplexity", "context", "tokens"}


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for seed, path in enumerate(paths):
        path.write_text(models.text(60, seed=seed))
    return list(map(str, paths))


def test_several_texts(checkpoint: Checkpoints, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if measured alone, the model loaded once."""
    alone = [secateur.evaluate(checkpoint(), text=text, context=48) for text in texts]
    loads: list[Any] = []
    from secateur.meters import evaluate, perplexity

    def counted(*arguments: Any) -> torch.nn.Module:
        loads.append(arguments)
        return perplexity.load_stock(*arguments)

    monkeypatch.setattr(evaluate, "load_stock", counted)
    monkeypatch.setattr(perplexity, "fits", lambda *_: pytest.fail("loaded a second time"))
    found = secateur.evaluate(checkpoint(), text=texts, context=48)
    assert len(loads) == 1
    assert {key: found[key] for key in _KEYS} == {key: alone[0][key] for key in _KEYS}
    assert found["texts"] == {t: {key: one[key] for key in _KEYS} for t, one in zip(texts, alone, strict=True)}
    assert "texts" not in alone[0]


def test_several_texts_against_another(
    checkpoint: Checkpoints, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(checkpoint()), "--against", str(checkpoint("mixtral")), "--context", "48"]
    for text in texts:
        words += ["--text", text]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--json"])
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out)
    for side in (found, found["against"], found["ratio"]):
        assert set(side["texts"]) == set(texts)
        assert all(set(figures) == _KEYS for figures in side["texts"].values())
    second = texts[1]
    ratio = found["texts"][second]["perplexity"] / found["against"]["texts"][second]["perplexity"]
    assert math.isclose(found["ratio"]["texts"][second]["perplexity"], ratio)
    with pytest.raises(SystemExit):
        main(words)
    assert "b.txt: perplexity" in capsys.readouterr().out.replace("\n", "")


def test_an_absent_text_is_refused(checkpoint: Checkpoints, texts: list[str]) -> None:
    with pytest.raises(RequestError, match=r"absent\.txt"):
        secateur.evaluate(checkpoint(), text=[*texts, "absent.txt"])
