"""Comparisons: what is asked, what is judged, what survives a kill, and what the table says."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur
from conftest import Checkpoints
from secateur.api import cells, comparing
from secateur.engine.comparison import CompareRequest, baseline_of, cells_of, rows_of
from secateur.engine.journal import work_folder
from secateur.engine.workers import Workers
from secateur.errors import InternalError, RequestError
from secateur.meters.pareto import judge, pareto_line, read_line
from secateur.meters.standings import judgement, summarise
from secateur.methods.registry import method_class, method_names
from test_errors import run

QUICK = ("--samples", "4", "--length", "16", "--context", "32")


class Inline:
    """Workers that run every job in this process, and remember what they were asked."""

    ran: list[str]

    def __init__(self, module: str, folder: Path) -> None:
        assert module == cells.__name__
        assert folder.is_dir()

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, function: str, job: dict[str, Any]) -> Any:
        Inline.ran.append(function)
        return json.loads(json.dumps(getattr(cells, function)(json.loads(json.dumps(job)))))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells run in this process and take no time for their speed; names of the functions that ran."""
    Inline.ran = []
    speeds = [{"prefill_tokens_per_second": 100.0 * i, "decode_tokens_per_second": 10.0 * i} for i in (1, 2)]
    monkeypatch.setattr(comparing, "Workers", Inline)
    monkeypatch.setattr(cells, "speeds", lambda *_: speeds)
    return Inline.ran


def words(model: Path, notes: Path, held_out: Path, output: Path, *more: str) -> list[str]:
    """The command on tiny windows."""
    texts = ("--data", str(notes), "--text", str(held_out), "-o", str(output))
    return ["compare", str(model), *texts, *QUICK, *more]


# -- judgement ---------------------------------------------------------------------------------------------------------

_sizes = st.lists(st.integers(10, 99), min_size=1, max_size=5, unique=True)


@given(_sizes, st.lists(st.floats(0.5, 9), min_size=5, max_size=5), st.floats(1, 100))
def test_lines_are_read_as_numpy_interpolates(sizes: list[int], values: list[float], wanted: float) -> None:
    points = [(float(x), y) for x, y in zip(sizes, values, strict=False)]
    line = pareto_line((100.0, 0.5), points)
    xs, ys = zip(*line, strict=True)
    assert list(xs) == sorted(xs)
    found = read_line(line, wanted)
    if wanted < min(sizes):
        assert found is None
        return
    assert found is not None
    assert not found.beyond
    assert found.value == pytest.approx(float(np.interp(wanted, xs, ys)), rel=1e-9)


def test_a_line_goes_on_by_less_than_a_step_and_no_further() -> None:
    line = pareto_line((100.0, 1.0), [(90.0, 2.0), (80.0, 4.0)])
    beyond = read_line(line, 79.5, slack=1.0)
    assert beyond is not None
    assert (beyond.value, beyond.beyond) == (pytest.approx(4.1), True)
    assert read_line(line, 78.9, slack=1.0) is None
    assert read_line([(100.0, 1.0)], 100.0) is None, "nothing was measured"


def test_points_of_one_size_are_one_and_infinite_ones_give_no_figure() -> None:
    assert pareto_line((10.0, 1.0), [(5.0, 2.0), (5.0, 4.0), (10.0, 9.0)]) == [(5.0, 3.0), (10.0, 1.0)]
    line = pareto_line((10.0, 1.0), [(8.0, 2.0), (5.0, math.inf)])
    assert read_line(line, 7.0) is None
    exact = read_line(line, 8.0)
    assert exact is not None
    assert exact.value == 2.0


def test_a_method_is_better_than_random_or_not() -> None:
    methods = {"random": [(50.0, 4.0)], "good": [(40.0, 3.0)], "bad": [(50.0, 5.0)], "short": [(90.0, 2.0)]}
    found = judge((100.0, 1.0), methods, "random", 60.0)
    assert {name: better for name, (_, better) in found.items()} == {
        "random": None, "good": True, "bad": False, "short": None,
    }  # fmt: skip
    assert found["short"][0] is None
    assert found["good"][0] is not None
    assert found["good"][0].value == pytest.approx(1 + 2 * 40 / 60)


def cell(method: str, ratio: float, params: int, perplexity: float | None, seed: int = 0, **more: Any) -> Any:
    """A finished cell."""
    speed = {"pruned": {"prefill": 2.0, "decode": 1.0}, "ratio": {"prefill": 2.0, "decode": 1.0}}
    return {
        "method": method, "layout": "native", "ratio": ratio, "seed": seed, "state": "done",
        "achieved": {"params": params}, "removed": 1 - params / 1000, "perplexity": perplexity, "speed": speed,
        "seconds": 1.0 + seed, "peak_rss_bytes": 10 + seed, "loads_in": {"transformers": "yes"}, **more,
    }  # fmt: skip


def test_verdicts_against_arithmetic_by_hand() -> None:
    """Random's seeds are averaged as logarithms; every figure is a straight line between its neighbours."""
    seeds = [20.0, 40.0, 50.0]
    records = [cell("random", 0.2, 800, value, seed) for seed, value in enumerate(seeds)]
    records += [cell("depth", 0.1, 850, 12.0), cell("depth", 0.2, 700, 30.0), cell("wild", 0.2, 790, None)]
    records.append({**cell("none", 0.2, 0, None), "state": "unreachable", "why": "too far"})
    summary = summarise(records)
    first = summary[0]
    assert first["perplexity"] == {"mean": pytest.approx(math.prod(seeds) ** (1 / 3)), "least": 20.0, "most": 50.0}
    assert (first["seconds"], first["peak_rss_bytes"], first["seeds"]) == (2.0, 12, 3)
    (verdict,) = judgement({"params": 1000, "perplexity": 5.0}, summary, ["native"], [0.2], "random")
    assert verdict["params"] == 800
    methods = verdict["methods"]
    expected = math.exp(np.interp(800, [700, 850, 1000], np.log([30.0, 12.0, 5.0])))
    assert methods["depth"]["perplexity"] == pytest.approx(expected)
    assert methods["random"]["perplexity"] == pytest.approx(math.prod(seeds) ** (1 / 3))
    assert methods["depth"]["better_than_random"] is True
    assert methods["wild"]["perplexity"] is methods["none"]["perplexity"] is None
    assert verdict["best"] == "depth"


# -- requests ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_list() -> None:
    names = "magnitude,magnitude:spaces=kv:of=reader,slicegpt"
    request = CompareRequest.model_validate({"model": "m", "methods": names, "options": {"slicegpt.basis": "subset"}})
    rows = rows_of(request)
    assert [row.label for row in rows] == [
        "magnitude", "magnitude:spaces=kv:of=reader", "slicegpt:basis=subset", "random",
    ]  # fmt: skip
    assert rows[1].settings.model_dump()["spaces"] == "kv"
    assert baseline_of(rows) == "random"
    every = cells_of(request, rows)
    assert len(every) == 2 * 3 * (3 + 3)
    assert {c.seed for c in every if c.row.method == "random"} == {0, 1, 2}
    assert len({c.name for c in every}) == len(every)


def test_all_structured_is_whatever_is_registered() -> None:
    rows = rows_of(CompareRequest.model_validate({"model": "m"}))
    wanted = {name for name in method_names() if method_class(name).group == "structured"}
    assert {row.label for row in rows} == wanted
    assert {"random", "magnitude", "prunenet", "slicegpt"} <= wanted


_BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown method": (("--methods", "magnitud"), "did you mean magnitude"),
    "unknown group": (("--methods", "all-structred"), "did you mean all-structured"),
    "unknown option": (("--methods", "magnitude:space=kv"), "did you mean spaces"),
    "no value": (("--methods", "magnitude:kv"), "key=value"),
    "option of nobody": (("--methods", "random", "--set", "magnitude.spaces=kv"), "add it to --methods"),
    "option without a method": (("--methods", "random", "--set", "spaces=kv"), "METHOD.spaces"),
    "ratio zero": (("--methods", "random", "--ratio", "0,0.1"), "ratio 0"),
    "ratio of words": (("--methods", "random", "--ratio", "a"), "ratio"),
    "a percentage": (("--methods", "random", "--ratio", "10"), "did you mean 0.1"),
    "bad layout": (("--methods", "random", "--layout", "each"), "layout"),
    "no such text": (("--methods", "random", "--text", "absent.txt"), "no such file"),
    "standard input": (("--methods", "random", "--data", "-"), "standard input"),
    "long windows": (("--methods", "slicegpt", "--length", "4096"), "length 4096"),
    "long context": (("--methods", "random", "--text", "{short}"), "shorter than one window"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_requests(
    name: str, checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, inline: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more, said = _BAD[name]
    (tmp_path / "short.txt").write_text("few words")
    given = [word.format(short=tmp_path / "short.txt") for word in more]
    code, out, err = run([*words(checkpoint(), notes, held_out, tmp_path / "out", *given), "--json"], capsys)
    assert code == 2, err
    assert said in " ".join(json.loads(out)["error"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    assert "make_and_measure" not in inline


def test_methods_that_need_text_do_not_begin_without(checkpoint: Checkpoints, held_out: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="slicegpt need calibration text"):
        secateur.compare(checkpoint(), methods=["slicegpt"], text=held_out, output=tmp_path / "out")
    with pytest.raises(RequestError, match="no held-out text"):
        secateur.compare(checkpoint(), methods="random", output=tmp_path / "out")


@pytest.mark.parametrize("how", ["same file", "same content", "part of it", "in the folder"])
def test_held_out_text_must_not_be_calibration_text(
    how: str, checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path
) -> None:
    data, text = notes, notes
    if how == "same content":
        text = tmp_path / "copy.txt"
        text.write_bytes(notes.read_bytes())
    if how == "part of it":
        text = held_out
        data = tmp_path / "both.txt"
        data.write_text(notes.read_text() + "\n" + held_out.read_text() + "\n the end")
    if how == "in the folder":
        data = notes.parent
    with pytest.raises(RequestError, match="it is part of the calibration text"):
        secateur.compare(checkpoint(), methods="random", data=data, text=text, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- runs --------------------------------------------------------------------------------------------------------------


def test_the_table(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, inline: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every cell is there, what is out of reach is said and is no failure, and a rerun has nothing to do."""
    out = tmp_path / "out"
    asked = ("--methods", "random,magnitude:spaces=kv,slicegpt", "--ratio", "0.1,0.8", "--json")
    code, printed, _ = run(words(checkpoint(), notes, held_out, out, *asked), capsys)
    assert code == 0
    result = json.loads(printed)
    assert result == json.loads((out / "results.json").read_text())
    assert len(result["cells"]) == 2 * 2 * (3 + 1 + 1)
    far = [c for c in result["cells"] if c["state"] == "unreachable"]
    assert {(c["method"], c["ratio"]) for c in far} >= {("random", 0.8), ("magnitude:spaces=kv", 0.8)}
    assert all("reaches from" in c["why"] for c in far)
    assert result["counts"] == {"done": 20 - len(far), "unreachable": len(far), "failed": 0}
    for found in result["cells"]:
        if found["state"] == "done":
            assert found["removed"] == 1 - found["achieved"]["params"] / result["dense"]["params"]
            assert found["perplexity"] > 1
            assert found["perplexity_before"] == result["dense"]["perplexity"]
            assert found["speed"]["ratio"] == {"prefill": 2.0, "decode": 2.0}
            assert found["loads_in"]["transformers"].startswith("verified")
            assert found["seconds"] > 0
            assert found["peak_rss_bytes"] > 0
    assert result["data"]["windows"] == 4
    assert result["dense"]["context"] == 32
    same = judgement(result["dense"], result["summary"], ["native", "per-layer"], [0.1, 0.8], "random")
    assert result["judgement"] == same
    assert same[0]["methods"]["slicegpt"]["better_than_random"] in (True, False)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "report.html", "results.json", "results.jsonl"]
    assert not work_folder(out).exists()
    for text in ((out / "README.md").read_text(), (out / "report.html").read_text()):
        for said in ("magnitude:spaces=kv", "Not reachable", "the control", result["machine"]["cpu"], "verified("):
            assert said in text, said
        assert result["text_sha256"] in text
    lines = (out / "results.jsonl").read_bytes()
    inline.clear()
    code, again, _ = run(words(checkpoint(), notes, held_out, out, *asked), capsys)
    assert code == 0
    assert inline == []
    assert (out / "results.jsonl").read_bytes() == lines
    assert {**json.loads(again), "seconds": 0} == {**result, "seconds": 0}


def test_figures_are_those_of_prune_and_evaluate(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, inline: list[str]
) -> None:
    arguments = {"data": notes, "samples": 4, "length": 16}
    result = secateur.compare(
        checkpoint(), methods="magnitude", ratio=0.1, text=held_out, context=32, layout="native",
        output=tmp_path / "out", keep=True, **arguments,
    )  # fmt: skip
    assert inline.count("make_and_measure") == 4
    (found,) = (c for c in result["cells"] if c["method"] == "magnitude")
    pruned = secateur.prune(checkpoint(), method="magnitude", ratio=0.1, output=tmp_path / "one", **arguments)
    figures = secateur.evaluate(tmp_path / "one", text=held_out, context=32)
    assert found["achieved"] == pruned.achieved
    assert found["perplexity"] == figures["perplexity"]
    kept = Path(found["output"])
    assert (kept / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    assert len(list((tmp_path / "out" / "models").iterdir())) == 4


def test_layouts_refuse_what_they_cannot_hold(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, inline: list[str]
) -> None:
    """GPT-2's heads cannot go natively; ``random.spaces`` is the option of the control."""
    result = secateur.compare(
        checkpoint("gpt2"), methods="random", options={"random.spaces": "kv"}, ratio="0.1", data=notes, samples=4,
        length=16, text=held_out, context=32, output=tmp_path / "out",
    )  # fmt: skip
    states = {(c["layout"], c["state"]) for c in result["cells"]}
    assert states == {("native", "unreachable"), ("per-layer", "done")}
    assert result["baseline"] == "random:spaces=kv"
    by_layout = {verdict["layout"]: verdict for verdict in result["judgement"]}
    assert by_layout["native"]["best"] is None
    assert by_layout["per-layer"]["methods"]["random:spaces=kv"]["better_than_random"] is None
    assert inline.count("make_and_measure") == 6


def test_another_request_is_refused_and_force_begins_anew(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, inline: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    asked = words(checkpoint(), notes, held_out, out, "--methods", "random", "--layout", "native", "--ratio", "0.2")
    assert run([*asked, "--quantum", "1"], capsys)[0] == 0
    before = (out / "results.jsonl").read_bytes()
    inline.clear()
    code, printed, _ = run([*asked, "--quantum", "2", "--json"], capsys)
    error = json.loads(printed)["error"]
    assert (code, error["code"]) == (2, "other-request")
    assert "quantum: 1 there, 2 here" in error["found"]
    assert "--force" in error["hint"]
    assert (out / "results.jsonl").read_bytes() == before
    assert inline == []
    assert not work_folder(out).exists()
    code, printed, _ = run([*asked, "--quantum", "2", "--json", "--force"], capsys)
    assert code == 0
    assert json.loads(printed)["requested"]["quantum"] == 2
    assert (tmp_path / "out.previous" / "results.jsonl").read_bytes() == before
    (tmp_path / "mine").mkdir()
    mine = words(checkpoint(), notes, held_out, tmp_path / "mine", "--methods", "random", "--json")
    code, printed, _ = run(mine, capsys)
    assert (code, json.loads(printed)["error"]["code"]) == (2, "output-exists")


def test_a_table_grows_by_what_is_new(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, inline: list[str]
) -> None:
    """More methods, ratios or layouts run the cells that are not there; other options are another cell."""

    def made(methods: str, ratio: str, **more: str) -> list[dict[str, Any]]:
        inline.clear()
        found = secateur.compare(
            checkpoint(), methods=methods, ratio=ratio, text=held_out, data=notes, samples=4, length=16, context=32,
            output=tmp_path / "out", **more,
        )  # fmt: skip
        cells: list[dict[str, Any]] = found["cells"]
        return cells

    first = made("random", "0.1", layout="native")
    assert inline.count("make_and_measure") == 3
    both = made("random,magnitude", "0.1,0.2")
    assert inline.count("make_and_measure") == 2 * 2 * 4 - 3
    assert [
        cell for cell in both if (cell["method"], cell["layout"], cell["ratio"]) == ("random", "native", 0.1)
    ] == first
    fewer = made("random", "0.2", layout="native")
    assert inline == []
    assert {cell["ratio"] for cell in fewer} == {0.2}
    made("random", "0.2", layout="native", options={"random.spaces": "kv"})
    assert inline.count("make_and_measure") == 3


def test_three_seeds_of_what_is_drawn() -> None:
    """Which methods run three seeds depends on their options."""
    expected = {
        "slicegpt": 1,
        "slicegpt:basis=random": 3,
        "slicegpt:orientation=random": 1,
        "dotresize:basis=random": 3,
        "dotresize:spaces=ffn:basis=random": 1,
        "disp_llm": 3,
        "disp_llm:mode=fisher": 1,
        "prunenet:policy=p:select=topk": 1,
        "random": 3,
    }
    request = CompareRequest(model="m", methods=tuple(expected), ratio=0.2, layout="per-layer")
    assert Counter(cell.row.label for cell in cells_of(request, rows_of(request))) == expected


# -- processes ---------------------------------------------------------------------------------------------------------

_PLUGIN = '''
import os, signal
from pathlib import Path
from secateur.methods.random import Random

class Killed(Random):
    """Dies the hard way until it is told not to."""
    name, title, group, seeded = "killed", "Killed", "broken", False

    def unit_scores(self, study, space):
        if not Path(os.environ["SPARED"]).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().unit_scores(study, space)

class Raising(Random):
    """Raises."""
    name, title, group, seeded = "raising", "Raising", "broken", False

    def unit_scores(self, study, space):
        raise ZeroDivisionError("nothing to divide by")
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two methods of a third party, found through their entry points; the file that spares one of them."""
    site = tmp_path / "site"
    facts = site / "broken-1.0.dist-info"
    facts.mkdir(parents=True)
    (site / "broken.py").write_text(_PLUGIN)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[secateur.methods]\nkilled = broken:Killed\nraising = broken:Raising\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("SPARED", str(tmp_path / "spared"))
    return tmp_path / "spared"


def test_cells_that_fail_do_not_end_the_run(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, plugin: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """They are in the table with what happened, make exit code 1 at the end, and run again with the next command."""
    out = tmp_path / "out"
    asked = ("--methods", "all-broken", "--layout", "native", "--ratio", "0.1", "--json")
    code, printed, err = run(words(checkpoint(), notes, held_out, out, *asked), capsys)
    result = json.loads(printed)
    assert code == 1
    assert result["error"]["code"] == "failed-cells"
    assert "2 of 5 cells" in err
    cells_by = {c["method"]: c for c in result["cells"]}
    assert "SIGKILL" in cells_by["killed"]["why"]
    assert "ZeroDivisionError: nothing to divide by" in cells_by["raising"]["why"]
    assert cells_by["random"]["state"] == "done"
    assert cells_by["random"]["speed"]["ratio"]["decode"] > 0
    assert result["counts"] == {"done": 3, "unreachable": 0, "failed": 2}
    assert "ZeroDivisionError" in (out / "README.md").read_text()
    assert not work_folder(out).exists()
    plugin.touch()
    before = (out / "results.jsonl").read_text()
    code, printed, _ = run(words(checkpoint(), notes, held_out, out, *asked), capsys)
    added = (out / "results.jsonl").read_text().removeprefix(before).splitlines()
    assert code == 1
    assert [json.loads(line)["method"] for line in added] == ["killed", "raising"]
    assert json.loads(printed)["counts"] == {"done": 4, "unreachable": 0, "failed": 1}


@pytest.mark.usefixtures("inline")
def test_what_a_model_does_not_have_is_a_line_that_was_not_reached(
    checkpoint: Checkpoints, held_out: Path, tmp_path: Path
) -> None:
    """Experts of a dense model; the others go on."""
    shown = secateur.compare(
        checkpoint(), methods=["stun"], ratio=[0.1], text=held_out, output=tmp_path / "table", layout="native"
    )
    states = {cell["method"]: cell["state"] for cell in shown["cells"]}
    assert states["stun"] != "done" == states["random"]


def test_a_killed_run_goes_on_where_it_was(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, inline: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    asked = words(checkpoint(), notes, held_out, out, "--methods", "magnitude", "--ratio", "0.1", "--json")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "secateur", *asked]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        journal, limit = out / "results.jsonl", time.monotonic() + 120
        while not (journal.is_file() and journal.read_bytes().count(b'"cell"') >= 2):
            assert started.poll() is None, started.communicate()[1].decode()
            assert time.monotonic() < limit
            time.sleep(0.02)
        started.send_signal(signal.SIGKILL)
    before = journal.read_bytes()
    done = sum(json.loads(line).get("step") == "cell" for line in before.splitlines())
    assert 2 <= done < 8
    code, printed, err = run(asked, capsys)
    assert code == 0, err
    assert f"{done} of 8 cells are done already" in err
    assert inline == ["make_and_measure"] * (8 - done)
    assert (out / "results.jsonl").read_bytes().startswith(before)
    result = json.loads(printed)
    assert result["counts"] == {"done": 8, "unreachable": 0, "failed": 0}
    assert not work_folder(out).exists()


def test_a_job_ends_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while a job runs ends the job; what a job raises is told."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "jobs.py").write_text(
        "import os, signal, time\nfrom pathlib import Path\n"
        "def fail(job):\n    return 1 / job['by']\n"
        "def last(job):\n    Path(job['pid']).write_text(str(os.getpid()))\n"
        "    os.kill(job['owner'], signal.SIGINT)\n    time.sleep(600)\n"
    )
    with Workers("jobs", tmp_path) as workers:
        assert workers.run("fail", {"by": 2}) == 0.5
        with pytest.raises(InternalError, match="fail: ZeroDivisionError"):
            workers.run("fail", {"by": 0})
    # what a shell starts in the background ignores interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Workers("jobs", tmp_path) as workers:
            workers.run("last", {"pid": str(tmp_path / "pid"), "owner": os.getpid()})
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_single_weights_are_a_group_of_their_own() -> None:
    """Variants of a method belong where their result belongs; zeros leave the layouts alike, so one is enough."""
    request = CompareRequest(model="m", methods=("all-unstructured",), ratio=(0.3,))
    rows = rows_of(request)
    labels = [row.label for row in rows]
    assert {"wanda", "sparsegpt", "magnitude:spaces=weights", "random:spaces=weights"} <= set(labels)
    assert not {"fasp", "magnitude", "d_pruner"} & set(labels)
    assert baseline_of(rows) == "random:spaces=weights"
    assert {cell.layout for cell in cells_of(request, rows)} == {"native"}
    both = rows_of(CompareRequest(model="m", methods=("all-unstructured", "fasp"), ratio=(0.3,)))
    assert {cell.layout for cell in cells_of(request, both)} == {"native", "per-layer"}
