"""Single weights: masks and weights against the released code of the papers, and time and memory beside it.

``--peer NAME=FOLDER`` names checkouts of ``wanda`` (magnitude, wanda, sparsegpt), ``sparsegpt`` (the class alone) and
``ria``; they run in ``--peer-python``'s environment. Without them ours is timed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import (
    GIB,
    MIB,
    RESULTS,
    Goal,
    Measured,
    Result,
    conditions,
    keep,
    llama_config,
    load,
    measure,
    parser,
    record,
    secateur,
    work_folder,
    write_checkpoint,
    write_ids,
)
from secateur.cuts.masks import best, parse_pattern
from secateur.evidence import Moments
from secateur.mends.obs import Choose, obs_sweep, shares_of
from secateur.scores.weights import ria_scores, wanda_scores

NAME = "sparse"
ASSETS = Path(os.environ.get("SECATEUR_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
SPARSITY, GROUP = 0.5, 128
WINDOWS, LENGTH = 64, 256
PATTERNS = ("element", "2:4")
PEERS = ("wanda", "sparsegpt", "ria")
METHODS = {"magnitude": "wanda", "wanda": "wanda", "sparsegpt": "wanda"}
"""Whose pruning of whole models a method is held against."""
CLOSE = 1e-4
UNLIKE = ("magnitude", "sparsegpt")
"""Methods whose released code differs in ties and counts, so that equality is asked of the rows that take it over."""


# -- one matrix after the other, fed with the same inputs --------------------------------------------------------------

READS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Matrices that read what another reads."""


@torch.no_grad()
def dump(model: nn.Module, ids: Tensor, blocks: int, folder: Path) -> None:
    """Write every matrix of the first blocks, and what it reads in the dense model, one file per block."""
    keys: dict[str, dict[str, str]] = {}
    for block in range(blocks):
        layer, found, seen, handles = model.model.layers[block], {}, {}, []
        readers = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for name, module in readers.items():
            found[f"weight.{name}"] = module.weight.data
            if name.rpartition(".")[2] not in READS:
                taken = seen.setdefault(f"inputs.{name}", [])
                handles.append(module.register_forward_pre_hook(lambda _, inputs, taken=taken: taken.append(inputs[0])))
        for batch in ids.split(8):
            model.model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        found.update({key: torch.cat(parts) for key, parts in seen.items()})
        save_file(found, folder / f"{block}.safetensors")
        heads = {name: name.rpartition(".") for name in readers}
        keys[f"{block}.safetensors"] = {
            name: f"{path}.{READS[last]}" if last in READS else name for name, (path, _, last) in heads.items()
        }
    (folder / "keys.json").write_text(json.dumps(keys), encoding="utf-8")


def pruned(method: str, pattern: str, weight: Tensor, gram: Moments) -> Tensor:
    """A matrix as our kernels leave it, given the moments of its inputs."""
    shape, named = parse_pattern(pattern), gram.named("x")
    squares, keep = named["x.gram"].diagonal() / named["x.count"], weight.numel() - int(weight.numel() * SPARSITY)
    if method == "sparsegpt":
        share = shares_of(keep, weight.shape[1])

        def choose(scores: Tensor, start: int, stop: int) -> Tensor:
            return best(scores, share(start, stop), "matrix", shape)

        return swept(weight, named["x.gram"], pattern, choose)
    if method == "magnitude":
        return weight * best(weight.abs(), keep, "matrix", shape)
    scores = wanda_scores(weight, squares) if method == "wanda" else ria_scores(weight, squares, 0.5)
    return weight * best(scores, keep, "row", shape)


def swept(weight: Tensor, gram: Tensor, pattern: str, choose: Choose) -> Tensor:
    """What the sweep makes of a matrix."""
    return obs_sweep(weight, gram, choose, width=GROUP, step=parse_pattern(pattern).of or None)[0]


def alike(method: str, pattern: str, weight: Tensor, gram: Tensor, theirs: Tensor, hessian: Tensor | None) -> Variants:
    """Ours with one thing after the other as the released code has it."""
    shape, kept = parse_pattern(pattern), theirs != 0

    def as_many(scores: Tensor, start: int, stop: int) -> Tensor:
        return best(scores, int(kept[:, start:stop].sum()), "matrix", shape)

    if method == "magnitude" and pattern == "element":
        yield "its number of entries", weight * best(weight.abs(), int(kept.sum()))
    if method == "sparsegpt":
        if pattern == "element":
            yield "its number of entries", swept(weight, gram, pattern, as_many)
        if hessian is not None:
            number = "its number of entries and " if pattern == "element" else ""
            yield f"{number}its Hessian", swept(weight, hessian, pattern, as_many)
        yield "its mask", swept(weight, gram, pattern, lambda _, start, stop: kept[:, start:stop])


Variants = Iterator[tuple[str, Tensor]]


@dataclass
class Agreement:
    """Of many matrices: equal mask entries, largest relative difference of what both keep.

    Attributes:
        entries, equal: of the masks.
        only_ours, only_theirs: entries that stay in one alone.
        whole: matrices with equal masks, of ``matrices``.
        difference: largest over the matrices of max |a - b| / max |b|, over what both keep.
    """

    entries: int = 0
    equal: int = 0
    only_ours: int = 0
    only_theirs: int = 0
    whole: int = 0
    matrices: int = 0
    difference: float = 0.0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Count a matrix."""
        mine, other = ours != 0, theirs != 0
        self.entries += mine.numel()
        self.equal += int((mine == other).sum())
        self.only_ours += int((mine & ~other).sum())
        self.only_theirs += int((other & ~mine).sum())
        self.whole += bool(torch.equal(mine, other))
        self.matrices += 1
        gap = ((ours - theirs) * (mine & other)).abs().max() / theirs.abs().max()
        self.difference = max(self.difference, float(gap))

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "equal_share": self.equal / self.entries,
            "matrices_with_equal_masks": f"{self.whole} of {self.matrices}",
            "kept_by_ours_alone": self.only_ours,
            "kept_by_theirs_alone": self.only_theirs,
            "largest_relative_difference": float(f"{self.difference:.1e}"),
        }


def matrix_by_matrix(folder: Path, outputs: dict[str, Path]) -> dict[str, Any]:
    """Ours on what was dumped against what the peers made of it."""
    found: dict[str, Agreement] = {}
    keys: dict[str, dict[str, str]] = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
    for file, readers in keys.items():
        theirs = {peer: load_file(output / file) for peer, output in outputs.items()}
        with safe_open(folder / file, framework="pt") as handle:
            for name, key in readers.items():
                weight, inputs = handle.get_tensor(f"weight.{name}"), handle.get_tensor(f"inputs.{key}")
                gram = Moments(inputs.shape[-1], torch.device("cpu"))
                for window in inputs.split(16):
                    gram.add(window)
                    gram.close_shard()
                for peer, weights in theirs.items():
                    for label in (each for each in weights if each.endswith(f".{name}")):
                        method, pattern = label.removesuffix(f".{name}").split(".")
                        if method == "hessian":
                            continue
                        row, other = f"{method} {pattern}, {peer}", weights[label]
                        ours = pruned(method, pattern, weight, gram)
                        found.setdefault(row, Agreement()).add(ours, other)
                        hessian = weights.get(f"hessian.{pattern}.{name}")
                        for what, variant in alike(method, pattern, weight, gram.second, other, hessian):
                            found.setdefault(f"{row}, {what}", Agreement()).add(variant, other)
                        if (method, pattern) == ("magnitude", "2:4"):
                            found.setdefault(f"{row}, groups without ties", Agreement()).add(
                                *untied(weight, ours, other)
                            )
    return {row: each.as_dict() for row, each in found.items()}


def untied(weight: Tensor, *others: Tensor) -> Iterator[Tensor]:
    """The groups of four of some matrices in which no tie decides what stays."""
    order = weight.abs().view(-1, 4).sort(dim=1, descending=True).values
    clear = order[:, 1] != order[:, 2]
    return (other.reshape(-1, 4)[clear] for other in others)


# -- whole models ------------------------------------------------------------------------------------------------------


def of_blocks(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The matrices of the blocks of a checkpoint folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a mapping)
                if ".layers." in name and name.endswith("_proj.weight"):
                    yield name, handle.get_tensor(name)


def agreement(ours: Path, theirs: Path) -> dict[str, Any]:
    """Of all matrices, and of those of the first block, which read the same signals."""
    every, first, others = Agreement(), Agreement(), dict(of_blocks(theirs))
    for name, tensor in of_blocks(ours):
        every.add(tensor, others[name])
        if ".layers.0." in name and name.rpartition(".")[0].endswith(("q_proj", "k_proj", "v_proj")):
            first.add(tensor, others[name])
    return {**every.as_dict(), "equal_share_of_q_k_v_of_the_first_block": first.equal / first.entries}


def told(run: Measured) -> dict[str, Any]:
    """Of a process that pruned a model."""
    assert run.peak_anonymous is not None
    return {
        "wall_s": round(run.seconds, 1),
        "cpu_s": run.cpu_seconds,
        "prune_s": round(float(run.json["seconds"]), 1),
        "peak_anonymous_mib": round(run.peak_anonymous / MIB),
    }


@dataclass(frozen=True)
class Case:
    """A model, its windows, and what it is pruned by."""

    name: str
    model: Path
    ids: Path
    tokens: str
    rows: tuple[tuple[str, str], ...]

    def run(self, method: str, pattern: str, work: Path, peers: dict[str, str], python: str) -> dict[str, Any]:
        """Ours and then the peer's, in a process each, on one thread."""
        ours, theirs = work / "ours", work / "theirs"
        size = "pattern=2:4" if pattern == "2:4" else f"sparsity={SPARSITY}"
        command = secateur("prune", self.model, "-o", ours, "--method", method, "--set", size, "--device", "cpu")
        if method == "magnitude":
            command += ["--set", "spaces=weights"]
        else:
            windows, length = self.tokens.split(" x ")
            command += ["--data", str(self.ids), "--samples", windows, "--length", length]
        row: dict[str, Any] = {"tokens": self.tokens, "date": conditions()["date"], "load": load()}
        row["ours"] = told(measure([*command, "--json"], ONE_THREAD))
        if METHODS[method] in peers:
            rest = map(str, (self.model, self.ids, theirs))
            command = [*peer_command(python, METHODS[method], peers), "whole", method, pattern, *rest]
            row["peer"] = told(measure(command, {**ONE_THREAD, "PYTHONPATH": ""}))
            row["agreement"] = agreement(ours, theirs)
        for folder in (ours, theirs):
            shutil.rmtree(folder, ignore_errors=True)
        return row


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def peer_command(python: str, peer: str, peers: dict[str, str]) -> list[str]:
    """The start of a command line of the peers' script."""
    return [python, str(Path(__file__).with_name("peer_sparse.py")), peer, peers[peer]]


def beside(name: str, what: str, row: dict[str, Any]) -> Iterator[Goal]:
    """A row's agreement, time and memory."""
    if "peer" not in row:
        return
    ours, theirs, shown = row["ours"], row["peer"], f"`{what}`, {name}, {row['tokens']} tokens"
    equal = row["agreement"]["equal_share"]
    yield Goal(f"{shown}, whole model: equal mask entries", "-", f"{equal:.4%}", None)
    yield Goal(
        f"{shown}: whole process",
        "<= the peer's time",
        f"{ours['cpu_s']} s against {theirs['cpu_s']} s of the processor "
        f"({ours['wall_s']} against {theirs['wall_s']} s by the clock)",
        ours["cpu_s"] <= theirs["cpu_s"],
    )
    memory = ours["peak_anonymous_mib"], theirs["peak_anonymous_mib"]
    yield Goal(
        f"{shown}: peak anonymous memory",
        "< the peer's",
        "{} MiB against {} MiB".format(*memory),
        memory[0] < memory[1],
    )


def trained(arguments: argparse.Namespace, work: Path) -> tuple[nn.Module, Tensor, Case]:
    """The trained model in float32 and its windows."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    from secateur.data.windows import calibration_windows

    windows, length = (16 if arguments.small else WINDOWS), LENGTH
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.save_pretrained(work / "trained")
    vocab = model.config.vocab_size
    ids = calibration_windows(str(arguments.text), arguments.model, vocab, windows, length, 0).ids
    np.save(work / "ids.npy", ids.numpy())
    rows = tuple((method, pattern) for pattern in PATTERNS for method in reversed(METHODS))
    return model, ids, Case(arguments.model.name, work / "trained", work / "ids.npy", f"{windows} x {length}", rows)


def wide(small: bool, work: Path) -> Case:
    """A random model of a larger shape and its windows."""
    windows, length = (4, 64) if small else (16, 512)
    hidden, layers, heads, ffn, vocab = (256, 2, 4, 512, 512) if small else (768, 12, 12, 2048, 16384)
    write_checkpoint(work / "random", llama_config(hidden, layers, heads, ffn, vocab, 2048, "float32"))
    ids, rows = write_ids(work / "random.npy", vocab, windows, length), (("wanda", "element"), ("sparsegpt", "element"))
    return Case("random", work / "random", ids, f"{windows} x {length}", rows)


def compared(model: nn.Module, ids: Tensor, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every matrix of the trained model, ours and the peers'."""
    peers, folder = peers_of(arguments), work / "matrices"
    folder.mkdir()
    dump(model, ids[: 8192 // LENGTH], 1 if arguments.small else len(model.model.layers), folder)
    outputs = {peer: work / peer for peer in peers}
    for peer, output in outputs.items():
        output.mkdir()
        command = [*peer_command(arguments.peer_python, peer, peers), "matrices", str(folder), str(output)]
        measure(command, {**ONE_THREAD, "PYTHONPATH": ""})
    found = matrix_by_matrix(folder, outputs)
    for written in (folder, *outputs.values()):
        shutil.rmtree(written)
    return found


def peers_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Checkouts by name."""
    return dict(pair.split("=", 1) for pair in arguments.peer)


PARTS = ("matrices", "trained", "random")


def main() -> None:
    """The matrices, the trained model, the random model; what is not run again stays as it was recorded."""
    options = parser(__doc__ or "")
    options.add_argument("--model", type=Path, default=ASSETS / "lm" / "llama-docs-8m", help="a trained Llama")
    options.add_argument("--text", type=Path, default=ASSETS / "text" / "docs" / "valid.txt", help="its text")
    options.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to run")
    options.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help=f"of {', '.join(PEERS)}")
    options.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment")
    arguments = options.parse_args()
    if not arguments.model.is_dir():
        print(f"skipped: no trained model in {arguments.model}; --model names one", file=sys.stderr)
        return
    peers, kept = peers_of(arguments), RESULTS / f"{NAME}.json"
    for name in (name for name in PEERS if name not in peers):
        print(f"peer {name}: skipped, no --peer {name}=FOLDER", file=sys.stderr)
    figures = json.loads(kept.read_text(encoding="utf-8"))["figures"] if kept.is_file() else {}
    where = conditions()
    with work_folder(arguments.work, 8 * GIB) as work:
        model, ids, case = trained(arguments, work)
        if "matrices" in arguments.parts:
            figures["matrices"] = compared(model, ids, arguments, work)
        cases = [case] if "trained" in arguments.parts else []
        cases += [wide(arguments.small, work)] if "random" in arguments.parts else []
        del model
        for case in cases:
            for method, pattern in case.rows:
                row = case.run(method, pattern, work, peers, arguments.peer_python)
                figures.setdefault(case.name, {})[f"{method} {pattern}"] = row
                print(case.name, method, pattern, row, file=sys.stderr, flush=True)
                if not arguments.small:
                    keep(result(dict(where), figures))
    record(result(where, figures), arguments.small)


def result(where: dict[str, Any], figures: dict[str, Any]) -> Result:
    """For the table."""
    goals = []
    for row, found in figures.get("matrices", {}).items():
        masks, gap = found["equal_share"], found["largest_relative_difference"]
        said = f"{masks:.5%} of the entries, {found['matrices_with_equal_masks']} matrices, weights to {gap:.1e}"
        exact = (
            not row.startswith(UNLIKE)
            or row.endswith(("Hessian", "mask", "ties"))
            or (row.startswith("magnitude") and row.endswith("entries"))
        )
        goals.append(
            Goal(
                f"`{row}`: one matrix after the other on the same inputs",
                f"equal masks, weights to {CLOSE:g}" if exact else "-",
                said,
                masks == 1 and gap <= CLOSE if exact else None,
            )
        )
    for name, rows in figures.items():
        if name != "matrices":
            goals += [goal for what, row in rows.items() for goal in beside(name, what, row)]
    return Result(
        NAME,
        "single weights beside the released code of the papers",
        where,
        goals,
        figures,
        [
            "the trained model in float32 (its weights were stored in bfloat16, so many are equal in size); the same "
            "token windows in the same order; random: hidden 768, 12 layers, ffn 2048, vocabulary 16384, float32",
            "matrix by matrix: every matrix of all blocks, fed with what it reads in the dense model on 8192 tokens",
            "the released code of magnitude and sparsegpt removes every entry of a group up to its (k+1)-th smallest, "
            "and what equals it; ours k: with `its number of entries` our kernels are asked for as many",
            "both factor H in float32; the released code also sums it in float32, ours in float64. With `its Hessian` "
            "our sweep is given theirs, with `its mask` our sweep makes up for what theirs removes, on our sums",
            "magnitude 2:4: of equal weights in a group ours keeps the first, torch.topk any; the row of groups "
            "without ties shows that nothing else differs",
            "whole processes on one thread, interpreter start, loading and saving included; ours also checks what it "
            "wrote and writes a report; RssAnon read from outside every 10 ms. Time by the clock is only told: the "
            "machine was busy with other work",
            "peers: released code with calls to CUDA made void and room for as many windows as there are",
        ],
    )


if __name__ == "__main__":
    main()
