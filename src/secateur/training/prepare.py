"""A recover request resolved against its models, its text and the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.checkpoints.folder import RECORD, read_json
from secateur.checkpoints.hub import locate
from secateur.data.windows import Windows, load_tokenizer
from secateur.engine.prepare import context_of, draw_windows, resolve_device, resolve_dtype
from secateur.engine.run import model_digest
from secateur.errors import RequestError, refuse
from secateur.families import Sizes
from secateur.families.resizing import sizes_of
from secateur.inference import open_checkpoint
from secateur.training.adapters import ranks_of, require_peft
from secateur.training.loop import Length
from secateur.training.options import DEFAULT_STEPS, RecoverRequest, Training, default_rate
from secateur.version import __version__

_ALL = 10**9


@dataclass(frozen=True)
class Recovery:
    """Everything that is decided before a weight is read.

    Attributes:
        source: record that lies in the model's folder, empty where it is none of ours.
        windows: drawn from the data; ``train`` and ``held_back`` are its rows.
        ranks: of the adapters, by parameter; empty for full training.
        compute: data type of the forward passes.
        weights: data type in which the trained model is held.
    """

    request: RecoverRequest
    options: Training
    checkpoint: Checkpoint
    teacher: Checkpoint | None
    source: dict[str, Any]
    windows: Windows
    train: Tensor
    held_back: Tensor
    length: Length
    ranks: dict[str, int]
    device: torch.device
    compute: torch.dtype
    weights: torch.dtype

    @property
    def sizes_before(self) -> Sizes:
        """Sizes before the cut, as far as the record tells; else the present ones."""
        return _sizes_in(self.source) or self.checkpoint.architecture.sizes

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on with."""
        request = self.request
        return {
            "version": __version__,
            "command": "recover",
            "model": model_digest(self.checkpoint),
            "teacher": None if self.teacher is None else model_digest(self.teacher),
            "method": request.method,
            "options": self.options.model_dump(mode="json"),
            "steps": self.length.steps,
            "seconds": self.length.seconds,
            "data": self.windows.record(),
            "device": self.device.type,
            "dtype": str(self.compute),
            "threads": torch.get_num_threads(),
            "seed": request.seed,
        }

    def requested(self) -> dict[str, Any]:
        """The request as it is reported."""
        request, teacher = self.request, self.request.teacher
        if teacher is not None and Path(teacher).exists():
            teacher = Path(teacher).resolve().name  # where it lies is nobody's business
        options = {**self.options.model_dump(mode="json")}
        for name in ("rank", "alpha", "ranks") if request.method == "full" else ():
            del options[name]
        for name in ("distill", "temperature", "hidden") if teacher is None else ():
            del options[name]
        lengths = {"steps": self.length.steps, "epochs": request.epochs, "minutes": request.minutes}
        return {"method": request.method, "teacher": teacher, **lengths, "options": options, "seed": request.seed}


def prepare_recovery(request: RecoverRequest, options: Training) -> Recovery:
    """Resolve a request.

    Raises:
        RequestError: the first thing at fault.
    """
    if request.data is None:
        refuse("no-data", "a recovery", "it trains on text and --data is not given", "--data notes.txt")
    if request.method == "lora":
        require_peft()
    device = resolve_device(request.device)
    checkpoint = open_checkpoint(Path(locate(request.model)))
    checkpoint.require_tokens("a recovery, which trains on the next token")
    teacher = None if request.teacher is None else open_checkpoint(Path(locate(request.teacher)))
    rate = options.learning_rate or default_rate(request.method, checkpoint.architecture.sizes.residual)
    options = options.model_copy(update={"learning_rate": rate})
    context = min(context_of(found) for found in (checkpoint, teacher) if found is not None)
    if teacher is not None:
        _require_same_tokens(checkpoint, teacher, request.trust_remote_code)
    source = _record_of(checkpoint)
    ranks = {}
    if request.method == "lora":
        ranks = ranks_of(
            checkpoint.architecture, options, _sizes_in(source) if teacher is None else teacher.architecture.sizes
        )
    windows = draw_windows(
        request.data,
        checkpoint,
        request.samples or _wanted(request, options),
        request.length,
        request.seed,
        request.text_field,
        request.trust_remote_code,
        context,
    )
    train, held_back = _split(windows.ids, options.validation, request.seed)
    compute = resolve_dtype(request.dtype, checkpoint, device)
    if compute == torch.float16:
        compute = torch.bfloat16  # a file in float16: gradients leave its range
    half_held = compute == torch.bfloat16 and request.method == "lora"  # the frozen weights; adapters stay in float32
    weights = compute if half_held or compute == torch.float64 else torch.float32
    length = _length(request, options, len(train))
    return Recovery(
        request,
        options,
        checkpoint,
        teacher,
        source,
        windows,
        train,
        held_back,
        length,
        ranks,
        device,
        compute,
        weights,
    )


def _wanted(request: RecoverRequest, options: Training) -> int:
    """Windows to read: as many as the steps visit, all where their number is not known."""
    if request.steps is None and (request.epochs or request.minutes):
        return _ALL
    return (request.steps or DEFAULT_STEPS) * options.batch + options.validation


def _length(request: RecoverRequest, options: Training, windows: int) -> Length:
    seconds = None if request.minutes is None else 60 * request.minutes
    steps = request.steps
    if request.epochs is not None:
        steps = max(1, round(request.epochs * windows / options.batch))
    if steps is None and seconds is None:
        steps = DEFAULT_STEPS
    return Length(steps, seconds)


def _split(ids: Tensor, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows to train on and windows held back, at most a fifth of all."""
    order = np.random.default_rng([seed, len(ids)]).permutation(len(ids))
    count = min(wanted, len(ids) // 5)
    return ids[np.sort(order[count:])], ids[np.sort(order[:count])]


def _require_same_tokens(checkpoint: Checkpoint, teacher: Checkpoint, trust_remote_code: bool) -> None:
    ours, theirs = (found.architecture.sizes.vocab for found in (checkpoint, teacher))
    asked = f"teacher {teacher.folder.path.name!r}"
    if ours != theirs:
        refuse("teacher-vocabulary", asked, f"it knows {theirs} tokens, the model {ours}", "name the uncut model")
    try:
        tables = [load_tokenizer(found.folder.path, trust_remote_code).get_vocab() for found in (checkpoint, teacher)]
    except RequestError:
        return  # token ids as data need no tokenizer; where one is needed, its absence is refused there
    if tables[0] != tables[1]:
        refuse(
            "teacher-vocabulary", asked, "its tokenizer numbers other tokens than the model's", "name the uncut model"
        )


def _record_of(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder.path / RECORD
    record = read_json(path) if path.is_file() else {}
    record.pop("packed", None)  # what is trained is written as it is
    return record


def _sizes_in(source: dict[str, Any]) -> Sizes | None:
    """Sizes before the cut as a record tells them; None where there is none, or one of another version."""
    try:
        return sizes_of(source["before"])
    except (KeyError, TypeError):
        return None
