"""Tasks of the lm-evaluation-harness (extra ``eval``): its own by name, and those of local files."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoints import Checkpoint
from secateur.data.windows import load_tokenizer
from secateur.engine.prepare import context_of
from secateur.errors import near, refuse

_BATCH = 32
_FEWSHOT_SEED = 1234  # lm-eval's own
_SUFFIXES = (".yaml", ".yml")


class Tasks:
    """Tasks that were found, to be run on any number of models.

    Args:
        names: of the harness's tasks, groups and tags; YAML files of tasks; folders of such files.

    Raises:
        RequestError: lm-eval is not installed, there is no such task (near ones are named), or its data cannot be read.
    """

    def __init__(self, names: Sequence[str]) -> None:
        asked = f"tasks {', '.join(names)}"
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            refuse("no-lm-eval", asked, "lm-eval is not installed", "pip install 'secateur[eval]'")
        folders = [Path(name).resolve() for name in names if Path(name).is_dir()]
        by_name = not all(Path(name).exists() for name in names)  # reading the harness's own tasks takes seconds
        with _quiet():
            self._manager = TaskManager(include_path=list(map(str, folders)) or None, include_defaults=by_name)
            specs = [spec for name in names for spec in self._find(name)]
            try:
                self._loaded = self._manager.load(specs)
            except Exception as error:  # whatever a task file, its code or its data set raises
                found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                refuse("bad-task", asked, found, "look at the task's file and its data set")
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)

    def _find(self, name: str) -> list[str]:
        """What the harness calls a task, the tasks of a folder, or the path of a file."""
        path = Path(name)
        if path.is_file():
            return [str(path.resolve())]
        if path.is_dir():
            index, folder = self._manager.task_index, path.resolve()
            found = [t for t in self._manager.all_subtasks if index[t].yaml_path.resolve().is_relative_to(folder)]
            return found or refuse("unknown-task", f"tasks of {name!r}", "the folder holds no task file")
        if name not in self._manager.all_tasks:
            if path.suffix in _SUFFIXES:
                refuse("unknown-task", f"task {name!r}", "there is no such file")
            refuse("unknown-task", f"task {name!r}", "lm-eval knows none", near(name, self._manager.all_tasks))
        return [name]

    def run(self, checkpoint: Checkpoint, model: torch.nn.Module, device: torch.device) -> dict[str, dict[str, float]]:
        """Figures of each task by metric, as lm-eval names them; ``samples`` is how many documents were scored.

        Args:
            checkpoint: where the model was loaded from.
            model: loaded by whatever loads this checkpoint, whatever its layout.
        """
        checkpoint.require_tokens("tasks of lm-eval")
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            wrapped = HFLM(
                pretrained=model,
                tokenizer=load_tokenizer(checkpoint.folder.path),
                max_length=context_of(checkpoint),
                batch_size=_BATCH,
                device=str(device),
            )
            found = lm_eval.evaluate(lm=wrapped, task_dict=self._loaded, log_samples=False)
        counts = found["n-samples"]
        return {task: _metrics(figures, counts.get(task, {})) for task, figures in found["results"].items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep standard output for the result, and progress bars for terminals."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def _metrics(figures: dict[str, Any], counts: dict[str, int]) -> dict[str, float]:
    """Numbers only; ``acc,none`` (no filter) becomes ``acc``."""
    found = {
        key.removesuffix(",none"): float(value)
        for key, value in figures.items()
        if isinstance(value, int | float) and "," in key
    }
    if "effective" in counts:
        found["samples"] = counts["effective"]
    return found
