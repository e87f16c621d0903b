"""Does another runtime compute what plain transformers computes?

The reference is the stock model in float32 on random tokens: the logits of a prompt, then a greedy continuation token
by token through its cache.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from secateur.checkpoints import Folder
from secateur.checkpoints.loading import load_model
from secateur.errors import InternalError

_PROMPT, _GENERATED = 48, 16
TOLERANCE: Final = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of a logit, relative to the largest logit of the prompt, by the type of the exported weights.
Runtimes multiply narrow weights in narrow types, so those bounds are wide: they find a wrong file, not a rounding."""


@dataclass(frozen=True)
class Reference:
    """What transformers computes.

    Attributes:
        prompt: token ids, [T].
        logits: of the prompt, [T, vocabulary], float32.
        generated: greedy continuation.
        margins: how far each generated token was ahead of the next best, in units of the largest logit.
    """

    prompt: list[int]
    logits: np.ndarray
    generated: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Ran:
    """What another runtime computed on the same prompt."""

    version: str
    logits: np.ndarray
    generated: list[int]


@dataclass(frozen=True)
class Outcome:
    """A comparison that held.

    Attributes:
        runtime: its name.
        version: package and version.
        prompt_tokens: tokens whose logits were compared.
        logits_difference: largest difference over the largest logit.
        tolerance: what was allowed.
        generated_tokens: greedy tokens that were equal.
    """

    runtime: str
    version: str
    prompt_tokens: int
    logits_difference: float
    tolerance: float
    generated_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_stock(folder: Path) -> Any:
    """The model of a folder in float32, ready to run."""
    model = load_model(Folder(folder), dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def reference(model: Any, context: int) -> Reference:
    """Run the stock model on seeded random tokens.

    Args:
        model: as :func:`load_stock` gives it.
        context: positions that the exported file admits; prompt and continuation stay within.
    """
    steps = max(1, min(_GENERATED, context // 4))
    length = max(1, min(_PROMPT, context - steps))
    ids = torch.randint(int(model.config.vocab_size), (1, length), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=ids, use_cache=True)
    logits = output.logits[0].float()
    scale = float(logits.abs().max())
    generated: list[int] = []
    margins: list[float] = []
    last = logits[-1]
    for _ in range(steps):
        best = last.topk(2)
        generated.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]) / scale)
        output = model(input_ids=best.indices[:1].view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        last = output.logits[0, -1].float()
    return Reference(ids[0].tolist(), logits.numpy(), generated, margins)


def compare(runtime: str, expected: Reference, found: Ran, tolerance: float) -> Outcome:
    """Require that both agree.

    Greedy tokens must be equal as far as transformers' own choice is clearer than the tolerance; behind a tie the
    continuations are of different texts and say nothing.

    Args:
        tolerance: as in ``TOLERANCE``.

    Raises:
        InternalError: they do not.
    """
    what = f"running the export in {runtime} ({found.version})"
    if found.logits.shape != expected.logits.shape:
        message = f"logits of shape {found.logits.shape}, transformers gives {expected.logits.shape}"
        raise InternalError("export-check", what, message)
    difference = float(np.abs(found.logits - expected.logits).max() / np.abs(expected.logits).max())
    if not difference <= tolerance:
        raise InternalError(
            "export-check", what, f"logits differ by {difference:.3g} of the largest, {tolerance} allowed"
        )
    equal = 0
    for wanted, got, margin in zip(expected.generated, found.generated, expected.margins, strict=True):
        if wanted != got:
            if margin > 2 * tolerance:
                message = f"greedy token {equal + 1} is {got}, transformers gives {wanted}"
                raise InternalError("export-check", what, message)
            break
        equal += 1
    return Outcome(runtime, found.version, len(expected.prompt), difference, tolerance, equal)
