"""PruneNet against the public package efficient_pruners 0.1.0: same checkpoint, episodes and share of neurons, one run.

The peer gets an environment of its own, made for the run, unless ``--peer-python`` names one.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from common import (
    GIB,
    MIB,
    Goal,
    Result,
    conditions,
    load,
    measure,
    opt_config,
    parser,
    record,
    secateur,
    work_folder,
    write_checkpoint,
)

TIMES = 20.0
SHARE = 0.3
PEER = "efficient_pruners==0.1.0"


def uneven(name: str, tensor: Any) -> None:
    """Give first FFN matrices rows of log-normal scale and columns of decaying energy."""
    if not name.endswith("fc1.weight"):
        return
    import torch

    layer = int(name.split("layers.")[1].split(".")[0])
    generator = torch.Generator().manual_seed(1000 + layer)
    rows, columns = tensor.shape
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    tensor *= torch.exp(0.5 * torch.randn(rows, 1, generator=generator)) * torch.logspace(0, -1, columns)
    tensor.copy_(tensor @ rotation.T)


def peer_python(folder: Path) -> str:
    """Make an environment with the peer in it; returns its interpreter."""
    import torch
    import transformers

    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    versions = [f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={transformers.__version__}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *versions, PEER], check=True)
    return python


def first_matrices(folder: Path) -> list[Any]:
    """The first FFN matrix of every layer of a checkpoint folder."""
    from safetensors import safe_open

    found: dict[int, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a mapping)
                if name.endswith("fc1.weight"):
                    found[int(name.split("layers.")[1].split(".")[0])] = handle.get_tensor(name).float()
    return [found[layer] for layer in sorted(found)]


def distance(one: Any, other: Any) -> float:
    """Two-sample Kolmogorov-Smirnov statistic of two sets of singular values."""
    import torch

    one, other = one.sort().values, other.sort().values
    points = torch.cat([one, other])
    below = [torch.searchsorted(values, points, right=True).double() / len(values) for values in (one, other)]
    return float((below[0] - below[1]).abs().max())


def mean_distance(references: list[Any], chosen: list[Any]) -> float:
    """Mean over the layers, singular values by a full decomposition in float64."""
    import torch

    values = [torch.linalg.svdvals(rows.double()) for rows in chosen]
    return sum(distance(r, v) for r, v in zip(references, values, strict=True)) / len(values)


def main() -> None:
    """Ours through the command line, whole process; the peer's fit and compress, without its start."""
    options = parser(__doc__ or "")
    options.add_argument("--peer-python", default=None, help="interpreter of an environment that holds the peer")
    options.add_argument("--episodes", type=int, default=20)
    arguments = options.parse_args()
    import torch
    from safetensors.torch import load_file

    small = arguments.small
    episodes = 2 if small else arguments.episodes
    hidden, layers, heads, ffn, vocab = (64, 2, 4, 256, 512) if small else (768, 12, 12, 3072, 50272)
    where = conditions()
    with work_folder(arguments.work, 12 * GIB) as work:
        python = arguments.peer_python or peer_python(work / "peer")
        model = work / "opt-random"  # the peer reads the architecture off the path
        write_checkpoint(model, opt_config(hidden, layers, heads, ffn, vocab), fill=uneven)
        loads = [load()]
        command = secateur("prune", model, "-o", work / "pruned", "--method", "prunenet", "--device", "cpu", "--json")
        ours = measure([*command, "--set", f"sparsity={SHARE}", "--set", f"episodes={episodes}"])
        loads.append(load())
        script = Path(__file__).with_name("peer_prunenet.py")
        peer = measure([python, str(script), str(model), str(SHARE), str(episodes), str(work / "rows.safetensors")])
        loads.append(load())
        dense, kept = first_matrices(model), first_matrices(work / "pruned")
        rows = load_file(work / "rows.safetensors")
    assert ours.peak_anonymous is not None
    assert peer.peak_anonymous is not None
    theirs = [rows[str(layer)] for layer in range(layers)]
    assert [len(r) for r in theirs] == [len(r) for r in kept]
    references = [torch.linalg.svdvals(matrix.double()) for matrix in dense]
    generator = torch.Generator().manual_seed(0)
    count = len(kept[0])
    drawn = [matrix[torch.randperm(ffn, generator=generator)[:count]] for matrix in dense]
    longest = [matrix[matrix.norm(dim=1).topk(count).indices] for matrix in dense]
    ks = {
        name: round(mean_distance(references, chosen), 4)
        for name, chosen in {"secateur": kept, "peer": theirs, "random": drawn, "row norm": longest}.items()
    }
    peer_times = peer.json
    peer_seconds = peer_times["fit_s"] + peer_times["compress_s"]
    times = peer_seconds / ours.seconds
    what = f"{episodes} episodes, {SHARE:.0%} of the neurons, "
    record(
        Result(
            "prunenet",
            f"PruneNet against {PEER}",
            {**where, "load_between": loads},
            [
                Goal(
                    what + "time of policy training and compression",
                    f">= {TIMES:g} x faster",
                    f"{times:.0f} x ({ours.seconds:.1f} s against {peer_seconds:.0f} s)",
                    times >= TIMES,
                ),
                Goal(
                    what + "mean KS distance of the chosen rows",
                    f"<= the peer's, {ks['peer']:.4f}",
                    f"{ks['secateur']:.4f}",
                    ks["secateur"] <= ks["peer"],
                ),
            ],
            {
                "ks": ks,
                "ours_s": round(ours.seconds, 1),
                "ours_phases_s": ours.phases,
                "peer_fit_s": round(peer_times["fit_s"], 1),
                "peer_compress_s": round(peer_times["compress_s"], 1),
                "ours_peak_mib": round(ours.peak_anonymous / MIB),
                "peer_peak_mib": round(peer.peak_anonymous / MIB),
            },
            [
                f"OPT shape: hidden {hidden}, {layers} layers, ffn {ffn}, vocabulary {vocab}, float32; random weights, "
                "the rows of fc1 of log-normal scale, its columns of decaying energy",
                "ours is the whole command, interpreter start, writing and reload check included; the peer's is fit "
                "plus compress alone, nothing written",
                "KS by full float64 decompositions in the benchmark, the same for all; random rows and rows of largest "
                "norm beside them",
            ],
        ),
        small,
    )


if __name__ == "__main__":
    sys.exit(main())
