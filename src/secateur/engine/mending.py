"""The sweep that mends: block by block, gather behind the cuts so far, let the method cut and mend, go on behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.cuts.masks import masked
from secateur.engine.ahead import ahead, to_send
from secateur.engine.blocks import BlockRunner
from secateur.engine.edited import EditedCheckpoint
from secateur.engine.fisher import FISHER, FisherFiles
from secateur.engine.journal import Journal
from secateur.engine.pairs import COMPARING
from secateur.engine.processes import ALONE, Processes
from secateur.engine.progress import Progress
from secateur.engine.solvable import solving
from secateur.engine.taps import Taps
from secateur.engine.walk import Walk
from secateur.families import Architecture, Block, place_name
from secateur.methods.base import Method
from secateur.methods.charts import score_charts
from secateur.plans import Edits, FactorFiles, Masks, Mend, Overlay, Plan
from secateur.plans.plan import file_digest
from secateur.spaces import BlockView


class MendSweep:
    """Complete a plan with what ``Method.mend`` says of every block.

    Args:
        checkpoint: the model as the rounds before left it, with every bias that the plan adds.
        method: whose ``mend`` to call.
        folder: the work folder; the edits lie there, one file per block.
        journal: records every finished block.
        dense: the model as it was before any round, for evidence that compares with it.
        fisher: Fisher matrices, if the method wants them.
        processes: those that share the calibration data.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Method,
        folder: Path,
        journal: Journal,
        progress: Progress,
        dense: Checkpoint,
        fisher: FisherFiles | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._fisher, self._processes = fisher, processes
        self.checkpoint, self.method, self.folder = checkpoint, method, folder
        self.journal, self.progress, self.dense = journal, progress, dense
        self._edits, self._masks, self._factors = Edits(folder), Masks(folder), FactorFiles(folder)
        self._done = {r["block"] for r in journal.done("mend") if self._digests(r["block"]) == r["sha256"]}

    @property
    def _architecture(self) -> Architecture:
        return self.checkpoint.architecture

    def _kept_file(self, block: Block) -> Path:
        return self.folder / f"kept-{place_name(block)}.safetensors"

    def _digests(self, block: Block) -> list[str]:
        path = self._kept_file(block)
        kept = file_digest(path) if path.is_file() else ""
        files = (self._edits, self._masks, self._factors)
        return [*(each.digest(place_name(block)) for each in files), kept]

    def run(
        self, plan: Plan, ids: Tensor, runner: Callable[[Checkpoint], BlockRunner], known: Mapping[str, Tensor]
    ) -> Plan:
        """The plan with all kept units and edits.

        Args:
            plan: what was decided so far.
            ids: calibration windows.
            runner: makes the stock model of a checkpoint.
            known: edits of the rounds before, which stay where this one makes none.
        """
        blocks = len(self._architecture.sizes.blocks)
        plan = replace(plan, edits=Overlay(plan.edits, known))
        stem = plan.edits_of(None)
        if stem and None not in self._done:
            self._edits.write(place_name(None), stem)
        places = {*plan.blocks, *((None,) if self.method.stem_mends else ())}
        if not places <= self._done:
            self.progress.start("mend", blocks)
            beside = None
            if any(name.endswith(COMPARING) for name in frozenset().union(*self._wanted)):
                beside = Walk(self.dense, runner(self.dense), ids, self.folder, "dense", processes=self._processes)
            edited = EditedCheckpoint(self.checkpoint, stem)  # what the first block reads
            walk = Walk(edited, runner(self.checkpoint), ids, self.folder, "mended", beside, self._processes)
            walk.resume(next((b for b in plan.blocks if b not in self._done), blocks))
            send = to_send(self.checkpoint.read, walk.runner.device)
            for block, source in ahead(lambda b: send(b) if b in plan.blocks else {}, range(walk.block, blocks)):
                if block in plan.blocks:
                    self._pass(walk, plan, source)
                else:
                    walk.skip()
                self.progress.step(block + 1)
            if None in places - self._done:
                evidence = walk.stem(self.method.stem_mends)
                mend = self._stage(None, edited.read(None), evidence, plan, len(self.method.mends), Mend(edits=stem))
                self._finish(None, mend)
            walk.close()
        found: dict[str, dict[str, Tensor]] = {"kept": dict(plan.kept), "score": {}}
        for place in self._architecture.places:
            if self._kept_file(place).is_file():
                for name, tensor in load_file(self._kept_file(place)).items():
                    kind, _, space = name.partition(".")
                    found.setdefault(kind, {})[space] = tensor
        charts = score_charts(found["score"], found["kept"]) if found["score"] else ()
        return replace(
            plan,
            kept=found["kept"],
            edits=Edits(self.folder),
            masks=Masks(self.folder),
            factors=FactorFiles(self.folder),
            charts=(*plan.charts, *charts),
        )

    def _fisher_of(self, block: int) -> dict[str, Tensor]:
        return {} if self._fisher is None else self._fisher.of(block)

    @property
    def _wanted(self) -> list[frozenset[str]]:
        return [*self.method.mends, self.method.stem_mends]

    def _pass(self, walk: Walk, plan: Plan, source: Mapping[str, Tensor]) -> None:
        """Take one block from the signal in front of it to that behind it."""
        block = walk.block
        decided = plan.edits_of(block)
        dense = {**source, **{name: tensor for name, tensor in decided.items() if name in source}}
        if block in self._done:
            place = place_name(block)
            made = Mend(edits=self._edits.of(place), masks=self._masks.of(place))
            walk.leave(dense if self.method.order == "dense" else _mended(dense, made), bool(self.method.stem_mends))
            return
        if self.method.order == "dense":
            taps = Taps(walk.runner, block, frozenset().union(*self.method.mends))
            walk.run(dense, taps)
            evidence, mend = {**taps.evidence(), **self._fisher_of(block)}, Mend(edits=decided)
            for stage in range(len(self.method.mends)):
                mend = self._stage(block, dense, evidence, plan, stage, mend)
            self._finish(block, mend)
            return
        mend = Mend(edits=decided)
        for stage, wanted in enumerate(self.method.mends):
            taps = Taps(walk.runner, block, wanted)
            walk.run(_mended(dense, mend), taps, advance=False, keep=not self.method.rewrites)
            evidence = {**taps.evidence(), **(self._fisher_of(block) if FISHER in wanted else {})}
            mend = self._stage(block, dense, evidence, plan, stage, mend)
        walk.leave(_mended(dense, self._finish(block, mend)), bool(self.method.stem_mends))

    def _stage(
        self,
        block: Block,
        dense: Mapping[str, Tensor],
        evidence: Mapping[str, Tensor],
        plan: Plan,
        stage: int,
        mend: Mend,
    ) -> Mend:
        """One stage more."""
        read = partial(self.dense.read, block)
        view = BlockView(self._architecture, block, _mended(dense, mend), read)
        with solving("mending", block):
            added = self.method.mend(view, evidence, plan, stage)
        return Mend(**{part.name: {**getattr(mend, part.name), **getattr(added, part.name)} for part in fields(Mend)})

    def _finish(self, block: Block, mend: Mend) -> Mend:
        """Write what was decided about a block; returns it as it will be read."""
        wide = {
            name: tensor.to(torch.float64 if self._stored(name) == "F64" else torch.float32).cpu()
            for name, tensor in mend.edits.items()
        }
        self._edits.write(place_name(block), wide)
        if mend.masks:
            self._masks.write(place_name(block), mend.masks)
        if mend.factors:
            self._factors.write(place_name(block), mend.factors)
        parts = {f"kept.{name}": units.contiguous().cpu() for name, units in mend.kept.items()}
        parts.update({f"score.{name}": values.contiguous().cpu() for name, values in mend.scores.items()})
        save_file(parts or {"none": torch.zeros(0)}, self._kept_file(block))
        self.journal.add("mend", block=block, sha256=self._digests(block))
        return Mend(mend.kept, wide, masks=mend.masks)

    def _stored(self, name: str) -> str:
        return self.checkpoint.dtypes.get(name, "F32")


def _mended(dense: Mapping[str, Tensor], mend: Mend) -> dict[str, Tensor]:
    """The tensors of a block with what was decided about them; what the plan adds to the block is not among them."""
    found = {name: mend.edits.get(name, tensor) for name, tensor in dense.items()}
    return {**found, **{name: masked(found[name], mask) for name, mask in mend.masks.items()}}
