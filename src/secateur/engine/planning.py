"""The plan of a run: summaries of all places, the decision, and the mends that complete it, in rounds and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from secateur.checkpoints import Checkpoint
from secateur.data.windows import Windows
from secateur.engine.blocks import BlockRunner
from secateur.engine.edited import CutCheckpoint, EditedCheckpoint, with_biases
from secateur.engine.fisher import FISHER, FisherFiles
from secateur.engine.journal import Journal
from secateur.engine.mending import MendSweep
from secateur.engine.prepare import Prepared
from secateur.engine.progress import Progress
from secateur.engine.solvable import solving
from secateur.engine.sweeps import SummarySweep, view_of
from secateur.engine.trials import CalibrationTrials
from secateur.families import Block
from secateur.methods.base import Study
from secateur.plans import Artifact, Edits, Plan
from secateur.spaces import BlockView


class Planning:
    """Everything between a request and its plan.

    Args:
        prepared: the resolved request.
        data: the calibration windows; None without data.
        texts: windows of the other texts that the method named.
        artifacts: what the method's ``files`` named, loaded.
        work: the work folder.
        journal: of the run; that of every round but an only one lies in a folder of its own.
        progress: who is told.
    """

    def __init__(
        self,
        prepared: Prepared,
        data: Windows | None,
        texts: Mapping[str, Windows],
        artifacts: Mapping[str, Artifact],
        work: Path,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.prepared, self.data, self.texts, self.artifacts = prepared, data, texts, artifacts
        self.ids = None if data is None else data.ids
        self.work, self.journal, self.progress = work, journal, progress

    def plan(self) -> Plan:
        """All steps in all their rounds; what an interrupted run has finished is not done again."""
        method = self.prepared.method
        method.sizes(self.prepared.budget)  # refuses an unreachable target before any sweep
        if len(method.chain) == 1:
            return self._rounds()
        first, *later = method.chain
        plan = self._step(1, replace(self.prepared, method=first))
        for number, step in enumerate(later, 2):
            left = CutCheckpoint(self.prepared.checkpoint, plan, self.prepared.request.layout)
            budget = self.prepared.budget.behind(plan.after)
            plan = plan.then(self._step(number, replace(self.prepared, method=step, checkpoint=left, budget=budget)))
        return plan

    def _step(self, number: int, prepared: Prepared) -> Plan:
        """The plan of one of several methods for the model that those before it leave, in a folder of its own."""
        folder, data = self.work / f"step-{number}", self.data if prepared.method.data == "text" else None
        folder.mkdir(exist_ok=True)
        journal = Journal(folder, self.journal.fingerprint)
        return Planning(prepared, data, self.texts, self.artifacts, folder, journal, self.progress)._rounds()

    def _rounds(self) -> Plan:
        method, plan = self.prepared.method, None
        for number in range(method.rounds):
            if method.rounds == 1:
                plan = _Round(self, self.work, self.journal, number, plan).plan()
                continue
            folder = self.work / f"round-{number + 1}"
            folder.mkdir(exist_ok=True)
            plan = _Round(self, folder, Journal(folder, self.journal.fingerprint), number, plan).plan()
        assert plan is not None
        return plan

    def runner(self, checkpoint: Checkpoint) -> BlockRunner:
        """The stock model of a checkpoint, to run blocks one at a time."""
        return BlockRunner(checkpoint.architecture, self.prepared.dtype, self.prepared.device, checkpoint.rest())


class _Round:
    """One round, on the model as the rounds before it left it."""

    def __init__(self, planning: Planning, folder: Path, journal: Journal, number: int, previous: Plan | None) -> None:
        self._planning, self._folder, self._journal = planning, folder, journal
        self._number, self._previous = number, previous
        self._method, self._dense = planning.prepared.method, planning.prepared.checkpoint
        self._checkpoint: Checkpoint = self._dense
        if previous is not None:
            self._checkpoint = EditedCheckpoint(with_biases(self._dense, previous), previous.edits, previous.masks)

    def plan(self) -> Plan:
        """The plan after this round."""
        plan, previous = self._decide(), self._previous
        if previous is not None:
            plan = replace(plan, kept={**previous.kept, **plan.kept})
        if not self._method.mends or self._planning.ids is None:
            return plan
        known = {} if previous is None else previous.edits
        sweep = MendSweep(
            with_biases(self._checkpoint, plan),  # what is added is part of the signal behind it
            self._method,
            self._folder,
            self._journal,
            self._planning.progress,
            self._dense,
            self._fisher(),
            self._planning.prepared.processes,
        )
        return sweep.run(plan, self._planning.ids, self._planning.runner, known)

    def _decide(self) -> Plan:
        """What the method decides from summaries of all places."""
        method, decided = self._method, self._folder / "decided"
        if any(Plan.digest(decided) == record["sha256"] for record in self._journal.done("decided")):
            return Plan.load(decided)
        planning = self._planning
        sweep = SummarySweep(
            self._checkpoint, method, self._folder, self._journal, planning.progress, planning.prepared.processes
        )
        if self._planning.ids is None:
            sweep.from_weights()
        elif method.evidence:
            sweep.from_data(self._planning.ids, self._planning.runner(self._checkpoint), self._fisher())
        with solving("the decision what goes"):
            plan = method.decide(self._study(sweep))
        if method.mends:  # kept apart until it is complete
            decided.mkdir(exist_ok=True)
            self._journal.add("decided", sha256=plan.save(decided))
            return Plan.load(decided)
        return plan

    def _fisher(self) -> FisherFiles | None:
        """The Fisher matrices of this round, gathered where the method wants them."""
        if FISHER not in self._method.evidence.union(*self._method.mends):
            return None
        planning = self._planning
        files = FisherFiles(self._folder, self._journal, planning.prepared.device)
        blocks = len(self._dense.architecture.sizes.blocks)
        files.gather(self._trials, blocks, planning.prepared.request.seed)
        return files

    def _study(self, sweep: SummarySweep) -> Study:
        planning = self._planning

        def view(place: Block, roles: tuple[str, ...] | None) -> BlockView:
            return view_of(self._checkpoint, place, roles)

        def progress(done: int, of: int, what: str) -> None:
            if done <= 1:
                planning.progress.start(what, of)
            planning.progress.step(done)

        def store(name: str) -> Edits:
            folder = self._folder / name
            folder.mkdir(exist_ok=True)
            return Edits(folder)

        generator = torch.Generator().manual_seed(planning.prepared.request.seed)
        study = Study(
            planning.prepared.budget,
            generator,
            view,
            sweep.summaries(),
            planning.artifacts,
            round=self._number,
            previous=self._previous,
            progress=progress,
            make_store=store,
        )
        if planning.ids is not None:
            study.make_trials, study.ids = self._trials, planning.ids
        study.make_trials_on = self._trials_on
        return study

    def _trials(self) -> CalibrationTrials:
        assert self._planning.data is not None
        return self._on(self._planning.data, self._folder, self._journal)

    def _trials_on(self, text: str) -> CalibrationTrials:
        folder = self._folder / f"text-{text}"
        folder.mkdir(exist_ok=True)
        return self._on(self._planning.texts[text], folder, Journal(folder, self._journal.fingerprint))

    def _on(self, data: Windows, folder: Path, journal: Journal) -> CalibrationTrials:
        prepared = self._planning.prepared
        return CalibrationTrials(
            self._checkpoint, data, prepared.dtype, prepared.device, folder, journal, prepared.processes
        )
