"""Zero-shot tasks of the lm-evaluation-harness (extra ``eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from secateur.checkpoints import Checkpoint
from secateur.errors import refuse


def task_figures(checkpoint: Checkpoint, tasks: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Figures of each task, as lm-eval names them.

    Raises:
        RequestError: lm-eval is not installed, or does not know a task.
    """
    try:
        import lm_eval
    except ImportError:
        refuse("no-lm-eval", f"tasks {', '.join(tasks)}", "lm-eval is not installed", "pip install 'secateur[eval]'")
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(checkpoint.folder.path)},
            tasks=list(tasks),
            device=str(device),
        )
    except KeyError as error:
        refuse("unknown-task", f"tasks {', '.join(tasks)}", f"lm-eval does not know {error}")
    results: dict[str, Any] = found["results"]
    return results
