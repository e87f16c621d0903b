"""Methods for modules on real CIFAR-10 ResNets and a real MobileNet, beside Torch-Pruning: accuracy before and after a
short fine-tune.

Every method of the registry that prunes modules runs with its default options, and some variants besides, to the same
share of the FLOPs; calibration sees training images only, accuracy is that of the test images, on which nothing was
chosen. Operations of all rows are counted by Secateur's graph.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from common import HERE, Goal, Result, conditions, parser, record
from secateur.errors import SecateurError
from secateur.methods.blocks import BlockMethod
from secateur.methods.registry import make_graph_method, module_methods
from secateur.reports.documentation import regenerate

ASSETS = Path(os.environ.get("SECATEUR_ASSETS", HERE.parents[1] / "shared" / "assets"))
PAGE = HERE.parent / "docs" / "cifar.md"
LEFT = (0.7, 0.5)
"""Shares of the FLOPs that remain."""
SEEDS = (0, 1, 2)
CALIBRATION, BATCH = 512, 128
"""Training images that methods may look at, and images at once."""
BLOCKS = 0.06
"""How far from the FLOPs methods may end that leave out whole blocks."""
TUNE = {"optimiser": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine", "epochs": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "spa score_by=l2": ("spa", {"score_by": "l2"}),
    "spa score_by=bn": ("spa", {"score_by": "bn"}),
    "spa ranking=local": ("spa", {"ranking": "local"}),
    "spa score_by=taylor": ("spa", {"score_by": "taylor"}),
    "spa score_by=fpgm": ("spa", {"score_by": "fpgm"}),
    "obspa without data": ("obspa", {}),
    "random": ("spa", {"score_by": "random"}),
}
LOOKS = ("obspa",)
"""Rows of methods that need no data, but look at it where there is some."""
PEERS = ("Torch-Pruning L1", "Torch-Pruning L1 local", "Torch-Pruning Taylor")


@dataclass(frozen=True)
class Images:
    """Images as bytes with labels, given out normalised.

    Attributes:
        pixels: [N, 3, H, W], uint8.
        labels: [N].
        mean, std: of the normalisation, by channel, for values from 0 to 1.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def batch(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        scale = [torch.tensor(part).view(1, 3, 1, 1) for part in (self.mean, self.std)]
        return (self.pixels[chosen].float() / 255 - scale[0]) / scale[1], self.labels[chosen]

    def batches(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels) if count is None else count
        return (self.batch(slice(start, min(start + BATCH, count))) for start in range(0, count, BATCH))


def script(path: Path) -> Any:
    """A loader that lies beside the assets."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar(part: str, count: int | None = None) -> Images:
    """CIFAR-10 images of the assets."""
    pixels, labels = script(ASSETS / "vision" / "cifar10" / "load.py").load(ASSETS / "vision" / "cifar10" / part)
    return Images(torch.from_numpy(pixels[:count]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[:count]))


def imagenet(size: int) -> Images:
    """The sample images of ImageNet, labels as MobileNet counts them, values from -1 to 1."""
    load = script(ASSETS / "vision" / "cifar10" / "load.py").load
    pixels, labels = load(ASSETS / "vision" / "imagenet_300" / "images224_jpeg.npz")
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
    resized = functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True).round().byte()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    half = (0.5,) * 3
    return Images(resized[order], torch.from_numpy(labels)[order] + 1, half, half)


@torch.inference_mode()
def predicted(model: nn.Module, images: Images, start: int = 0) -> Tensor:
    """The class of every image."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = []
    for first in range(start, len(images.labels), BATCH):
        inputs, _ = images.batch(slice(first, first + BATCH))
        found.append(model(inputs.contiguous(memory_format=torch.channels_last)).argmax(1))
    return torch.cat(found)


def tuned(model: nn.Module, images: Images, count: int) -> nn.Module:
    """A short fine-tune, the same for all: mirrored and shifted images, one pass."""
    model = copy.deepcopy(model).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    steps = TUNE["epochs"] * (count // BATCH)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=TUNE["lr"], momentum=TUNE["momentum"], weight_decay=TUNE["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    for step in range(steps):
        if step % (count // BATCH) == 0:
            order = torch.randperm(count, generator=generator)
        inputs, labels = images.batch(order[(step * BATCH) % count :][:BATCH])
        inputs = torch.where(torch.rand(len(inputs), 1, 1, 1, generator=generator) < 0.5, inputs.flip(3), inputs)
        down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
        inputs = functional.pad(inputs, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
        loss = functional.cross_entropy(model(inputs.contiguous(memory_format=torch.channels_last)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def operations(model: nn.Module, example: Tensor) -> int:
    """FLOPs of one run."""
    graph = secateur.graph(model, example)
    return 2 * graph.costs.macs(graph.gone({}))


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A network with its images.

    Attributes:
        plain: the same function in a form that the peer reads; the network itself if it does.
    """

    name: str
    model: nn.Module
    example: Tensor
    calibration: list[tuple[Tensor, Tensor]]
    plain: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.model
        self.flops = operations(self.model, self.example)


def pruned(task: Task, label: str, left: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The network cut by one of the methods."""
    method, options = VARIANTS.get(label, (label, {}))
    made = make_graph_method(method, options)
    needs = "inputs" if label in LOOKS else made.data
    batches = None if needs == "none" else task.calibration
    result = secateur.prune(
        task.model,
        method=method,
        target=[f"flops={left:.0%}"],
        example_inputs=task.example,
        data=batches,
        options=options,
        seed=seed,
        tolerance=BLOCKS if isinstance(made, BlockMethod) else 0.02,
    )
    assert result.model is not None
    return result.model, {"refused": dict(result.refused), "data": needs}


def with_convolutions(model: nn.Module) -> nn.Module:
    """The CIFAR ResNet with its padded shortcuts written as convolutions of ones and zeros, which the peer reads."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if getattr(block, "extra", 0):
            small = block.conv1.in_channels
            shortcut = nn.Conv2d(small, small + block.extra, 1, block.stride, bias=False)
            with torch.no_grad():
                shortcut.weight.zero_()
                for channel in range(small):
                    shortcut.weight[channel + block.extra // 2, channel] = 1
            block.shortcut = shortcut
            block.forward = _forward.__get__(block)
    return model


def _forward(self: Any, x: Tensor) -> Tensor:
    y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
    return functional.relu(self.shortcut(x) + y)


def peer(task: Task, label: str, left: float) -> tuple[nn.Module, dict[str, Any]]:
    """The network cut by Torch-Pruning, in small steps until no more than the wanted FLOPs remain."""
    import torch_pruning

    model = copy.deepcopy(task.plain).eval().requires_grad_(True)
    for block in model.modules():
        if hasattr(block, "shortcut"):
            block.forward = _forward.__get__(block)
    taylor = label.endswith("Taylor")
    importance = torch_pruning.importance
    pruner = torch_pruning.pruner.BasePruner(
        model,
        task.example,
        importance=importance.GroupTaylorImportance() if taylor else importance.GroupMagnitudeImportance(p=1),
        global_pruning=not label.endswith("local"),
        pruning_ratio=0.9,
        iterative_steps=90,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
    )
    while operations(model, task.example) > left * task.flops:
        if taylor:
            model.zero_grad()
            for inputs, labels in task.calibration:
                functional.cross_entropy(model(inputs), labels).backward()
        pruner.step()
    return model, {"version": torch_pruning.__version__, "data": "labels" if taylor else "none"}


# -- run ---------------------------------------------------------------------------------------------------------------


class Journal:
    """What was measured already, line by line in a file; without one nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / "cifar.jsonl"
        self._rows: dict[str, dict[str, Any]] = {}
        if self._path is not None and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._rows[entry["key"]] = entry["found"]

    def of(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key, made if it is not there."""
        if key not in self._rows:
            started = time.process_time()
            try:
                found = make()
            except SecateurError as error:
                found = {"failed": error.args[0] if error.args else str(error)}
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                found = {"failed": f"{type(error).__name__} ({Path(where.filename).name}): {error}"[:200]}
            self._rows[key] = found | {"cpu_seconds": round(time.process_time() - started, 1)}
            print(key, json.dumps(self._rows[key]), flush=True)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "found": self._rows[key]}) + "\n")
        return self._rows[key]


class Run:
    """All rows of all networks.

    Args:
        small: two methods, few images.
        tune: training images of a fine-tune.
        methods: rows to run; None for all.
    """

    def __init__(self, small: bool, tune: int, journal: Journal, methods: list[str] | None) -> None:
        self.small, self.journal = small, journal
        self.tune = 2 * BATCH if small else tune
        self.train = cifar("train_20k.npz", self.tune if small else None)
        self.test = cifar("test_5k.npz", 256 if small else None)
        self.labels = [*VARIANTS, *module_methods()] if not small else ["spa", "random"]
        if importlib.util.find_spec("torch_pruning") is None:
            print("torch-pruning is not installed: nothing beside", file=sys.stderr)
        else:
            self.labels += PEERS[: 1 if small else None]
        self.labels = [label for label in self.labels if methods is None or label in methods]

    def resnet(self, name: str) -> Task:
        model = script(ASSETS / "cnn" / "resnet_cifar.py").load(str(ASSETS / "cnn" / name))
        task = Task(name, model, torch.randn(1, 3, 32, 32), list(self.train.batches(CALIBRATION)))
        task.plain = with_convolutions(model)
        return task

    def accuracy(self, model: nn.Module) -> float:
        return float((predicted(model, self.test) == self.test.labels).float().mean())

    def cut(self, task: Task, label: str, left: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        model, told = peer(task, label, left) if label in PEERS else pruned(task, label, left, seed)
        params = sum(p.numel() for p in model.parameters())
        return model, {"flops": operations(model, task.example) / task.flops, "params": params, **told}

    def row(self, task: Task, label: str, left: float, tune: bool) -> dict[str, Any]:
        """Accuracy of a method's network, of several seeds if it is the random one."""
        found: dict[str, Any] = {}
        seeds = SEEDS if label == "random" and not tune else SEEDS[:1]
        for seed in seeds:
            model, told = self.cut(task, label, left, seed)
            if tune:
                model = tuned(model, self.train, self.tune)
            found = told | {"accuracies": [*found.get("accuracies", []), round(self.accuracy(model), 4)]}
        return found | {"accuracy": float(np.mean(found["accuracies"]))}

    def resnets(self, name: str, tune: tuple[float, ...]) -> dict[str, Any]:
        """One network: all methods without a fine-tune, then some of them with one."""
        task = self.resnet(name)
        dense = self.journal.of(f"{name} dense", lambda: {"accuracy": self.accuracy(task.model)})
        rows: dict[str, Any] = {"dense": dense["accuracy"]}
        for left, after in [(left, False) for left in LEFT] + [(left, True) for left in tune]:
            for label in self.labels:
                key = f"{left:.0%} {'tuned' if after else 'as cut'} {label}"
                rows[key] = self.journal.of(
                    f"{name} {key}", lambda label=label, left=left, after=after: self.row(task, label, left, after)
                )
        return rows

    def mobilenet(self) -> dict[str, Any]:
        """MobileNet v1: 100 sample images for methods that look at images, agreement and top-1 on the other 200."""
        name = "mobilenet_v1_0.5_160-imagenet"
        model = script(ASSETS / "cnn" / "mobilenet.py").load(str(ASSETS / "cnn" / name))
        images = imagenet(160)
        calibration = [images.batch(slice(start, start + 50)) for start in (0, 50)]
        task = Task(name, model, torch.randn(1, 3, 160, 160), calibration)
        dense, labels = predicted(model, images, 100), images.labels[100:]
        rows: dict[str, Any] = {"dense": float((dense == labels).float().mean())}

        def row(label: str, left: float) -> dict[str, Any]:
            model, told = self.cut(task, label, left, 0)
            found = predicted(model, images, 100)
            agree, right = (found == dense).float().mean(), (found == labels).float().mean()
            return told | {"agreement": round(float(agree), 4), "accuracy": round(float(right), 4)}

        for left in (0.9, 0.7):
            for label in self.labels:
                key = f"{left:.0%} as cut {label}"
                rows[key] = self.journal.of(f"{name} {key}", lambda label=label, left=left: row(label, left))
        return rows


def best(rows: dict[str, Any], start: str, peers: bool) -> tuple[str, float] | None:
    """The row with the highest accuracy among ours or the peer's."""
    found = {
        key.removeprefix(start).strip(): row["accuracy"]
        for key, row in rows.items()
        if key.startswith(start) and "accuracy" in row and (key.endswith(PEERS) == peers)
    }
    return max(found.items(), key=lambda item: item[1]) if found else None


def goals(networks: dict[str, dict[str, Any]]) -> list[Goal]:
    """Our best beside the peer's best, and random removal, for every network and size."""
    found = []
    for name, rows in networks.items():
        for start in dict.fromkeys(" ".join(key.split()[: 3 if "as cut" in key else 2]) for key in rows if "%" in key):
            ours, theirs = best(rows, start, False), best(rows, start, True)
            random = rows.get(f"{start} random", {}).get("accuracy")
            if ours is None:
                continue
            beside = f"random {random:.1%}, dense {rows['dense']:.1%}" if random is not None else ""
            if theirs is None:
                found.append(Goal(f"{name}, {start}: best", "-", f"{ours[0]} {ours[1]:.1%} ({beside})", None))
            else:
                what = f"{name}, {start}: best accuracy beside Torch-Pruning's best"
                text = f"{ours[0]} {ours[1]:.1%} ({beside})"
                found.append(Goal(what, f">= {theirs[1]:.1%} ({theirs[0]})", text, ours[1] >= theirs[1]))
    return found


def table(rows: dict[str, Any]) -> str:
    """Accuracies of one network as Markdown: a line for every method, a column for every size; the best first."""
    columns = list(dict.fromkeys(" ".join(key.split()[: 3 if "as cut" in key else 2]) for key in rows if "%" in key))
    labels = list(dict.fromkeys(key.removeprefix(c).strip() for c in columns for key in rows if key.startswith(c)))
    labels.sort(key=lambda label: -rows.get(f"{columns[0]} {label}", {}).get("accuracy", 0))
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines.append("| the whole network |" + f" {rows['dense']:.1%} |" * len(columns))
    for label in labels:
        cells = []
        for column in columns:
            row = rows.get(f"{column} {label}", {})
            shown = f"{row['accuracy']:.1%}" if "accuracy" in row else row.get("failed", "-")[:60]
            cells.append(shown + (f" (agrees {row['agreement']:.1%})" if "agreement" in row else ""))
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """All rows; a journal in the work folder makes the run resumable."""
    options = parser(__doc__ or "")
    options.add_argument("--tune-images", type=int, default=20_000, help="training images of the fine-tune")
    options.add_argument("--tune", nargs="*", default=["resnet20-cifar10"], help="networks that are fine-tuned")
    options.add_argument("--networks", nargs="*", default=["resnet20-cifar10", "mobilenet", "resnet56-cifar10"])
    options.add_argument("--methods", nargs="*", default=None, help="some of the rows; nothing is recorded then")
    arguments = options.parse_args()
    if not ASSETS.is_dir():
        sys.exit(f"no trained models: {ASSETS} is absent (SECATEUR_ASSETS names another folder)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    where = conditions()
    run = Run(arguments.small, arguments.tune_images, Journal(arguments.work), arguments.methods)
    networks = {}
    for name in arguments.networks:
        if name == "mobilenet":
            networks[name] = run.mobilenet()
        else:
            networks[name] = run.resnets(name, (0.5,) if name in arguments.tune else ())
        print(f"\n{name}\n\n{table(networks[name])}\n", flush=True)
    notes = [
        f"shares of the FLOPs that remain, counted by Secateur's graph for all; methods that need "
        f"data see {CALIBRATION} training images; accuracy on the 5,000 test images; `random` is the mean of three "
        "seeds where it is not tuned",
        f"fine-tune: {TUNE['epochs']} epoch over {run.tune} training images, batches of {BATCH}, {TUNE['optimiser']}, "
        f"learning rate {TUNE['lr']} with a cosine, the same for all rows",
        "Torch-Pruning: GroupMagnitudeImportance(p=1) or GroupTaylorImportance, 1 % of the channels at a time until no "
        "more than the FLOPs remain; it fails on the padded shortcuts of these networks, so it is given the same "
        "function with 1 x 1 convolutions of ones and zeros in their place",
        f"layers_lottery leaves out whole blocks, so it may end {BLOCKS:.0%} off",
        "MobileNet v1 0.5 160: methods that need data see 100 of the 300 sample images, the other 200 are measured",
    ]
    title, partial = "methods for modules on real networks", arguments.small or arguments.methods is not None
    record(Result("cifar", title, where, goals(networks), {"networks": networks}, notes), partial)
    if not partial:
        text = PAGE.read_text(encoding="utf-8")
        tables = "\n\n".join(f"## {name}\n\n{table(rows)}" for name, rows in networks.items())
        told = "\n".join(f"* {note}" for note in notes)
        PAGE.write_text(regenerate(text, {"cifar": lambda: f"{tables}\n\n## Conditions\n\n{told}"}), encoding="utf-8")


if __name__ == "__main__":
    main()
