"""Damaged and hostile files: a short run of what ``benchmarks/bench_fuzz.py`` does at length."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import hostile
import models
import mutations
import secateur
from conftest import Checkpoints
from secateur.checkpoints import Folder
from secateur.engine.journal import Journal
from secateur.errors import RequestError

FEW = {hostile.resume: 2, hostile.resume_training: 2}
"""Examples of targets that take a whole run each."""


@pytest.mark.filterwarnings("ignore")  # of the numbers and templates that bad files hold
@pytest.mark.parametrize("name", hostile.TARGETS)
def test_bad_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target = hostile.TARGETS[name]
    box = hostile.Sandbox(tmp_path / "box", target)
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

    @settings(max_examples=FEW.get(target.read, 12), derandomize=True, database=None, suppress_health_check=checks)
    @given(st.randoms(use_true_random=False))
    def one(random: Random) -> None:
        try:
            box.try_one(random)
        finally:
            box.restore()

    one()


@pytest.mark.parametrize("mutate", [mutations.of_json, mutations.of_yaml, mutations.of_bytes])
def test_mutations_change_something_and_repeat(mutate: mutations.Mutation) -> None:
    good = json.dumps({"a": [1, {"b": "text"}], "c": {"d": None}, "e": 0.5}).encode()
    made = [mutate(good, Random(seed)) for seed in range(50)]
    assert made == [mutate(good, Random(seed)) for seed in range(50)]
    assert len(set(made) - {good}) > 30


def test_links_out_of_the_folder_are_not_followed_by_names(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """An index names files of its own folder; where one is a link, it is the user who put it there."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "linked.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    names = load_file(tmp_path / "elsewhere.safetensors")

    def index(file: object) -> None:
        content = {"weight_map": dict.fromkeys(names, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    index("linked.safetensors")  # as in the hub's cache
    assert Folder(folder).headers.keys() == names.keys()
    for bad in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "a" * 300, ["x"], "a\0b", ".."):
        index(bad)
        with pytest.raises(RequestError, match=r"leaves the folder|is not in the folder"):
            Folder(folder)


def test_an_array_that_claims_more_than_its_file_holds_takes_no_memory(checkpoint: Checkpoints, tmp_path: Path) -> None:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    (tmp_path / "ids.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64)
    with pytest.raises(RequestError, match="not a readable array"):
        secateur.prune(
            checkpoint(), method="fasp", ratio=0.2, data=tmp_path / "ids.npy", length=8, output=tmp_path / "out"
        )


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("1", "2", 1),
        lambda text: "[" + text,
        lambda text: "7\n" + text,
        lambda text: text.replace('"crc32"', '"crc"'),
    ],
)
def test_a_journal_whose_request_is_damaged_is_not_begun_anew(damage: Callable[[str], str], tmp_path: Path) -> None:
    first = Journal(tmp_path, {"what": 1})
    first.add("cut", place=0)
    first.path.write_text(damage(first.path.read_text()))
    before = first.path.read_bytes()
    with pytest.raises(RequestError, match="not as it was written"):
        Journal(tmp_path, {"what": 1})
    assert first.path.read_bytes() == before


def test_from_a_damaged_line_on_nothing_is_believed(tmp_path: Path) -> None:
    first = Journal(tmp_path, {"what": 1})
    for place in range(3):
        first.add("cut", place=place)
    lines = first.path.read_text().splitlines(keepends=True)
    first.path.write_text("".join([*lines[:2], lines[2].replace('"place": 1', '"place": 7'), lines[3]]))
    assert [record["place"] for record in Journal(tmp_path, {"what": 1}).done("cut")] == [0]


def test_nothing_of_a_folder_is_run(tmp_path: Path) -> None:
    """Code beside the weights stays where it is, whatever the configuration says of it."""
    folder = models.save(tmp_path / "model")
    (folder / "modeling_llama.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "modeling_llama.Config", "AutoModelForCausalLM": "modeling_llama.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": mapped}))
    secateur.prune(folder, method="magnitude", ratio=0.2, output=tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "config.json").is_file()


class _Payload:
    """What unpickles as a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("command", ["prune", "evaluate", "recover", "pack", "preview", "export"])
def test_no_command_runs_code_or_opens_pickles(command: str, tmp_path: Path, notes: Path) -> None:
    """Code and pickles beside the weights, named by every file that can name them."""
    folder, ran = models.save(tmp_path / "model"), tmp_path / "ran"
    code = f"import os\nos.mkdir({str(ran)!r})\n"
    for name in ("modeling_other.py", "tokenization_other.py", "configuration_other.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(_Payload(ran)))
    mapped = {
        "config.json": {"AutoConfig": "configuration_other.C", "AutoModelForCausalLM": "modeling_other.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_other.T", "tokenization_other.T"]},
    }
    for name, auto_map in mapped.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": auto_map}))
    short: dict[str, Any] = {"data": notes, "samples": 4, "length": 8}
    calls: dict[str, Callable[[], object]] = {
        "prune": lambda: secateur.prune(folder, method="fasp", ratio=0.2, output=tmp_path / "out", **short),
        "evaluate": lambda: secateur.evaluate(folder, text=notes, context=8),
        "recover": lambda: secateur.recover(folder, data=notes, output=tmp_path / "out", steps=1, length=8),
        "pack": lambda: secateur.pack(folder, tmp_path / "out", form="sparse"),
        "preview": lambda: secateur.preview(folder, method="magnitude", ratio=0.2),
        "export": lambda: secateur.export(folder, tmp_path / "out.gguf", check=False),
    }
    calls[command]()  # as if none of it were there
    assert not ran.exists()


def test_weights_in_pickles_alone_are_refused_unopened(tmp_path: Path) -> None:
    folder, ran = models.save(tmp_path / "model"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(ran)))
    for call in (
        lambda: secateur.prune(folder, method="magnitude", ratio=0.2, output=tmp_path / "out"),
        lambda: secateur.evaluate(folder),
        lambda: secateur.load(folder),
    ):
        with pytest.raises(RequestError, match="not safetensors"):
            call()
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
