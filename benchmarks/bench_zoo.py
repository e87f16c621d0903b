"""Cutting architectures nobody here wrote rules for: timm models with random weights, beside Torch-Pruning.

For every model: seconds to build the graph, what can be cut, what was cut to half of the parameters, and whether the
cut network computes what the uncut one does with the same channels silenced (float64, all parameters stirred).
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import multiprocessing
import resource
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import HERE, Goal, Result, conditions, parser, record
from secateur.api.channels import graph, prune_module
from secateur.errors import SecateurError
from secateur.graph.modules import ModuleBench, silenced
from secateur.graph.state import tensor_at
from secateur.graph.verify import relative_difference

MODELS = (HERE / "zoo_models.txt").read_text(encoding="utf-8").split()
RATIO = 0.5
PEER_RATIO = 0.3  # of the channels of every layer: about half of the parameters
EXACT = 1e-8
LIMIT = 1800  # seconds, far more than the processor seconds take on a busy machine
CPU_LIMIT = 30  # processor seconds


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and an image; as small a one as it takes, at most its own size."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    size = model.default_cfg["input_size"][-1]
    size = size if model.default_cfg.get("fixed_input_size") else min(size, 64)
    image = torch.randn(1, 3, size, size)
    try:
        with torch.no_grad():
            model(image)
    except Exception:
        image = torch.randn(1, 3, *model.default_cfg["input_size"][1:])
    return model, image


def fastest(work: Callable[[], Any], rounds: int = 2) -> float:
    """Processor seconds of the fastest of some calls."""
    found = []
    for _ in range(rounds):
        gc.collect()
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def ours(name: str) -> dict[str, Any]:
    """What Secateur makes of a model."""
    model, image = model_of(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, Any] = {"family": type(model).__module__.rpartition(".")[2], "params": count}
    found["build_seconds"] = fastest(lambda: graph(model, image))
    spaces = graph(model, image)
    found["unknown"] = {op: len(places) for op, places in spaces.unknown.items()}
    uncut, image = stirred(model, image), image.double()
    before = {key: value.clone() for key, value in uncut.state_dict().items()}
    for settings in ({}, {"statistics": "change"}, {"statistics": "change", "tolerance": 1.0}):
        options = {key: value for key, value in settings.items() if key == "statistics"}
        try:
            asked = {"ratio": RATIO, "options": options, "tolerance": settings.get("tolerance", 0.02)}
            result = prune_module(uncut, image, asked)
        except SecateurError as error:
            found["refused"] = str(error)
            continue
        found.pop("refused", None)
        break
    else:
        return found
    sound = [space for space in spaces.spaces if space.name not in result.refused]
    also = [space for space in spaces.spaces if "statistics=change" in result.refused.get(space.name, "")]
    exact, every = [space for space in sound if not space.flags], [*sound, *also]
    return found | {
        "settings": settings,
        "share_exact": spaces.reachable(exact) / spaces.parameters() if exact else 0.0,
        "share": spaces.reachable(every) / spaces.parameters() if every else 0.0,
        "left": result.achieved["params"] / count,
        "flops_left": result.achieved["flops"] / result.achieved["flops_before"],
        "seconds": {part: round(value, 2) for part, value in result.parts.items()},
        "not_cut": Counter(_reason(reason) for reason in result.refused.values()).most_common(),
        "untouched": all(torch.equal(before[key], value) for key, value in uncut.state_dict().items()),
        **compared(uncut, result.model, image),
    }


def stirred(model: nn.Module, image: Tensor) -> nn.Module:
    """A copy in float64 in which no value of a parameter occurs twice."""
    return ModuleBench(model, graph(model, image), image).copy


@torch.no_grad()
def compared(uncut: nn.Module, cut: nn.Module, image: Tensor) -> dict[str, Any]:
    """Whether a cut model runs, and how far it is from the uncut one in which what went is silent."""
    found = cut(image)
    with silenced(uncut, kept_positions(uncut, cut)):
        wanted = uncut(image)
    same = found.shape == wanted.shape
    return {"runs": same, "error": relative_difference(wanted, found) if same else float("inf")}


def _reason(text: str) -> str:
    """A reason without the place."""
    return text.partition(" (")[0][:120]


def peer(name: str) -> dict[str, Any]:
    """What Torch-Pruning makes of a model, used as its timm example uses it."""
    import torch_pruning

    model, image = model_of(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, Any] = {"version": torch_pruning.__version__, "params": count}

    def build() -> None:
        made = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=image)
        list(made.get_all_groups())

    found["build_seconds"] = fastest(build)
    model, image = model_of(name)  # anew: some modules keep tensors of a run with gradients, which cannot be copied
    uncut, image = stirred(model, image), image.double()
    cut = copy.deepcopy(uncut).requires_grad_(True)
    heads = {m.qkv: m.num_heads for m in cut.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    pruner = torch_pruning.pruner.MagnitudePruner(
        cut,
        image,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=PEER_RATIO,
        ignored_layers=[m for m in cut.modules() if isinstance(m, nn.Linear) and m.out_features == model.num_classes],
        num_heads=heads,
    )
    pruner.step()
    for module in cut.modules():
        if getattr(module, "qkv", None) in heads:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):
                module.attn_dim = module.num_heads * module.head_dim
    found["left"] = sum(parameter.numel() for parameter in cut.parameters()) / count
    return found | compared(uncut, cut, image)


def kept_positions(uncut: nn.Module, cut: nn.Module) -> dict[str, dict[int, Tensor]]:
    """Positions that stay in every parameter, found by the values of the cut one: stirred values occur once.

    Raises:
        ValueError: a cut parameter is no selection of rows, columns, ... of the uncut one.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for name, small in cut.named_parameters():
        large = tensor_at(uncut, name)
        if large.shape == small.shape:
            continue
        values, order = large.detach().flatten().sort()
        index = torch.searchsorted(values, small.detach().flatten()).clamp(max=len(values) - 1)
        places = torch.unravel_index(order[index], large.shape)
        found[name] = {}
        for dim, place in enumerate(places):
            kept = place.unique()
            if len(kept) < large.shape[dim]:
                found[name][dim] = kept
        chosen = large.detach()
        for dim, kept in found[name].items():
            chosen = chosen.index_select(dim, kept)
        if not torch.equal(chosen, small.detach()):
            raise ValueError(f"{name} is no selection of what it was")
    return found


SIDES: dict[str, Callable[[str], dict[str, Any]]] = {"secateur": ours, "torch_pruning": peer}


def _child(side: str, name: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_LIMIT, spent + CPU_LIMIT))
    try:
        found = SIDES[side](name)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        lines = (str(error).strip() or "no message").splitlines()
        found = {"failed": f"{type(error).__name__} ({Path(where.filename).name}): {lines[0][:160]}"}
    pipe.send(found)


def alone(side: str, name: str) -> dict[str, Any]:
    """One side on one model, in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(side, name, there))
    process.start()
    there.close()
    try:
        return dict(here.recv()) if here.poll(LIMIT) else {"failed": f"not done after {LIMIT} s"}
    except EOFError:
        process.join()
        return {"failed": f"the process ended with {process.exitcode} (more than {CPU_LIMIT} processor seconds: -9)"}
    finally:
        process.kill()
        process.join()


def is_cut(found: dict[str, Any]) -> bool:
    """Whether a model was cut, runs, and computes what its mask does."""
    return bool(found.get("runs")) and found["error"] <= EXACT and found["left"] < 1


def is_wrong(found: dict[str, Any]) -> bool:
    """Whether a cut model was handed over that computes something else."""
    return "error" in found and not found["error"] <= EXACT


def summed_up(rows: dict[str, dict[str, Any]]) -> tuple[list[Goal], dict[str, Any]]:
    """Goals and figures of all models."""
    mine = {name: row["secateur"] for name, row in rows.items()}
    theirs = {name: row["torch_pruning"] for name, row in rows.items() if "torch_pruning" in row}
    families = {found["family"] for found in mine.values() if "family" in found}
    wrong, whole = sum(map(is_wrong, mine.values())), sum(map(is_cut, mine.values()))
    shares = [found["share"] for found in mine.values() if "share" in found]
    goals = [
        Goal(
            "timm models, architecture files among them",
            ">= 40 models, >= 20 files",
            f"{len(mine)}, {len(families)}",
            len(mine) >= 40 and len(families) >= 20,
        ),
        Goal("cut models that do not compute what their mask does", "0", str(wrong), wrong == 0),
    ]
    figures: dict[str, Any] = {
        "cut_and_equal": whole,
        "at_half_of_the_parameters": sum(abs(found.get("left", 1) - RATIO) <= 0.02 for found in mine.values()),
        "without_any_change_of_statistics": sum(is_cut(found) and not found["settings"] for found in mine.values()),
        "mean_share_of_parameters_in_sound_spaces": round(statistics.mean(shares), 3),
        "failed": sum("failed" in found or "refused" in found for found in mine.values()),
    }
    if theirs:
        good = sum(map(is_cut, theirs.values()))
        runs = sum(bool(found.get("runs")) for found in theirs.values())
        ratios = [
            mine[name]["build_seconds"] / found["build_seconds"]
            for name, found in theirs.items()
            if "build_seconds" in found and "build_seconds" in mine[name]
        ]
        middle = statistics.median(ratios)
        goals += [
            Goal(
                "models cut, run and equal to their mask, beside Torch-Pruning", f">= {good}", str(whole), whole >= good
            ),
            Goal(
                "seconds to build the graph and all groups, against Torch-Pruning's, median over the models that both "
                "build",
                "<= 1 x",
                f"{middle:.2f} x",
                middle <= 1,
            ),
        ]
        figures |= {
            "torch_pruning_runs": runs,
            "torch_pruning_wrong": sum(map(is_wrong, theirs.values())),
            "torch_pruning_failed": sum("failed" in found for found in theirs.values()),
            "build_ratio_quartiles": [round(value, 2) for value in statistics.quantiles(ratios, n=4)],
        }
    return goals, figures


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line for every model."""
    lines = [
        "| model | M params | build s | peer's | share cuttable (exactly) | left | error | peer's left | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        found, other = row["secateur"], row.get("torch_pruning", {})

        def number(value: Any, form: str = ".2f") -> str:
            return format(value, form) if isinstance(value, int | float) else "-"

        own = found.get("failed") or found.get("refused") or number(found.get("error"), ".0e")
        theirs = other.get("failed") or number(other.get("error"), ".0e")
        shares = f"{number(found.get('share'))} ({number(found.get('share_exact'))})"
        cells = [
            name,
            number(found.get("params", 0) / 1e6),
            number(found.get("build_seconds")),
            number(other.get("build_seconds")),
            shares,
            number(found.get("left")),
            own,
            number(other.get("left")),
            theirs,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Every model, both sides; a journal in the work folder makes the run resumable."""
    options = parser(__doc__ or "")
    options.add_argument("--models", nargs="*", default=None, help="names of timm models instead of the list")
    options.add_argument("--table", type=Path, default=None, help="also write a line for every model, as Markdown")
    arguments = options.parse_args()
    import timm

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where = conditions() | {"timm": timm.__version__}
    sides = ["secateur"]
    if importlib.util.find_spec("torch_pruning") is None:
        print("torch-pruning is not installed: nothing beside")
    else:
        import torch_pruning

        sides.append("torch_pruning")
        where["torch_pruning"] = torch_pruning.__version__
    names = arguments.models or (MODELS[:3] if arguments.small else MODELS)
    journal = None if arguments.work is None else arguments.work / "zoo.jsonl"
    rows: dict[str, dict[str, Any]] = {}
    if journal is not None and journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            rows.setdefault(entry["model"], {})[entry["side"]] = entry["found"]
    for name in names:  # both sides one after the other: the machine is the same for both
        for side in sides:
            if side not in rows.setdefault(name, {}):
                rows[name][side] = alone(side, name)
                print(name, side, json.dumps(rows[name][side]), flush=True)
                if journal is not None:
                    journal.parent.mkdir(parents=True, exist_ok=True)
                    with journal.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"model": name, "side": side, "found": rows[name][side]}) + "\n")
    rows = {name: rows[name] for name in names}
    if arguments.table is not None:
        arguments.table.write_text(table(rows) + "\n", encoding="utf-8")
    goals, figures = summed_up(rows)
    notes = [
        "random weights of timm's own initialisation, stirred, in float64; images of at most 64 pixels where the model "
        "takes them; processor seconds of one thread, the faster of two calls",
        f"Secateur: `spa`, ratio {RATIO} of the parameters, `statistics=change` where exact spaces do not reach it; "
        f"Torch-Pruning: MagnitudePruner, {PEER_RATIO} of the channels of every layer, as in its example for timm",
        "the list was trimmed by time alone, none left out because it fails; every row is a process of its own with at "
        f"most {CPU_LIMIT} processor seconds",
        "the mask is found from the values of the cut model alone; layer and group norms of the masked model take "
        "their statistics over what stays, for both sides",
    ]
    record(Result("zoo", "timm architectures", where, goals, figures, notes), arguments.small or bool(arguments.models))


if __name__ == "__main__":
    main()
